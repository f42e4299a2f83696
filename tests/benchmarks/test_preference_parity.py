"""Our runs with preferences against TRL's own trainers: see benchmarks/preference_parity.py for the tolerance."""

import pytest
from transformers import AutoTokenizer

from benchmarks import preference_parity
from benchmarks.preference_parity import (
    ANSWER_TOKENS,
    COMPARISONS,
    EXAMPLES_OF_A_ROW,
    FITTING,
    ROWS_PER_STEP,
    SEQ_LEN,
    compare,
    same_losses,
    write_examples,
)
from tests.conftest import TINY


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_row_holds_a_fixed_number_of_the_examples_whichever_they_are(loss, tmp_path):
    count, lengths = EXAMPLES_OF_A_ROW[loss], FITTING[loss]
    assert count * lengths[-1] <= SEQ_LEN[loss] < (count + 1) * lengths[0]
    assert count * ROWS_PER_STEP[loss] == COMPARISONS
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    found = write_examples(loss, tmp_path / "data.jsonl", tokenizer)
    answers = [
        e[name][0]["content"] for e in found.values() for name in {"chosen", "rejected", "completion"} & e.keys()
    ]
    assert max(len(tokenizer(answer + "<|end|>")["input_ids"]) for answer in answers) <= ANSWER_TOKENS
    assert len(found) % count == 0
    assert len(found) >= 30 * 8  # enough for thirty steps without a second epoch
    assert (tmp_path / "data.jsonl").read_text().count("\n") == len(found)


def test_losses_beyond_what_is_allowed_are_found():
    assert same_losses({"differences": [1e-5, 1e-4], "allowed": [1e-4, 1e-4]})
    assert not same_losses({"differences": [1e-5, 2e-4], "allowed": [1e-4, 1e-4]})
    assert preference_parity.allowed_difference(0, 1.0, 10**6) < 2e-5
    assert preference_parity.allowed_difference(0, 1.0, 10**6) < preference_parity.allowed_difference(9, 1.0, 10**6)


@pytest.mark.slow  # thirty steps of both
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_thirty_losses_are_those_of_trls_trainer(loss):
    result = compare(loss, steps=30)
    assert len(result["ours_losses"]) == len(result["plain_losses"]) == 30
    assert result["ours_losses"][-1] < 0.8 * result["ours_losses"][0]  # it does learn in these steps
    assert same_losses(result), result
