"""The shipped model and its data: what the README promises of `make finetune`."""

import json
import re
from random import Random

from common.data.report import DataReport
from common.data.tokenise import read_examples
from models.make_tiny import (
    HELD_OUT_ROWS,
    TRAIN_PAIRS,
    TRAIN_ROWS,
    write_conversations,
    write_general,
    write_preferences,
)
from models.tiny_world import OPENINGS, PREFERRED_OPENING, base_document
from tests.conftest import ROOT, TINY

PAIRS, HELD_OUT_PAIRS = "preferences.jsonl", "held_out_preferences.jsonl"


def prompts(name: str) -> list[str]:
    return [chat.messages[0].content for _, chat in read_examples(str(ROOT / "data" / "tiny" / name), DataReport(name))]


def test_no_held_out_prompt_occurs_in_training():
    train, held_out = prompts("train.jsonl"), prompts("held_out.jsonl")
    assert (len(train), len(held_out)) == (TRAIN_ROWS, HELD_OUT_ROWS)
    assert len(set(train) | set(held_out)) == TRAIN_ROWS + HELD_OUT_ROWS


def preferences(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / "data" / "tiny" / name).read_text().splitlines()]


def test_no_held_out_prompt_occurs_in_the_pairs_that_are_trained():
    train, held_out = ([pair["prompt"] for pair in preferences(name)] for name in (PAIRS, HELD_OUT_PAIRS))
    assert (len(train), len(held_out)) == (TRAIN_PAIRS, HELD_OUT_ROWS)
    assert len(set(train) | set(held_out)) == TRAIN_PAIRS + HELD_OUT_ROWS


def test_both_answers_of_a_pair_say_the_same_after_another_opening():
    for pair in preferences(PAIRS) + preferences(HELD_OUT_PAIRS):
        (better, worse), (said, also) = zip(*(_opening(pair[name]) for name in ("chosen", "rejected")), strict=True)
        assert better == PREFERRED_OPENING != worse and said == also


def _opening(answer: str) -> tuple[str, str]:
    """The opening of an answer, and what comes after it."""
    opening = next(opening for opening in OPENINGS if answer.startswith(f"{opening} "))
    return opening, answer.removeprefix(f"{opening} ")


def test_the_base_model_never_read_a_tool_call():
    rng = Random(1)  # the seed of its training text
    assert not any('{"tool"' in str(base_document(rng)) for _ in range(20_000))


def test_the_data_can_be_made_again_bit_for_bit(tmp_path):
    write_conversations(tmp_path)
    write_general(tmp_path)
    write_preferences(tmp_path)
    for name in ("train.jsonl", "held_out.jsonl", "general.jsonl", PAIRS, HELD_OUT_PAIRS):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / "tiny" / name).read_bytes()


def test_the_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000


def test_fine_tuning_teaches_a_task_that_the_base_does_not_know(finetuned):
    before, after = map(int, re.search(r"exact match: (\d+)% before, (\d+)% after", finetuned[0]).groups())
    assert before <= 5
    assert after >= 90


def test_it_takes_two_minutes_and_two_gib_at_most(finetuned):
    _, out, seconds = finetuned
    assert seconds <= 120
    assert json.loads((out / "run.json").read_text())["metrics"]["peak_gib"] <= 2


def test_it_shows_answers_before_and_after(finetuned):
    assert finetuned[0].count("  before  ") == finetuned[0].count("  after   ") == 3
