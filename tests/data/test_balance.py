"""What is said of better and worse answers: lengths, ratings, contradictions, one example of each."""

import json
import re

import pytest
from datasets import Dataset

from common.data.balance import Balance
from common.data.rows import load_rows
from common.tokens.labels import IGNORED
from tests.data.test_docs_examples import PAGE
from tests.sources.test_other_kind import data


def write_pairs(folder, rows: list[dict]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_page_shows_what_is_printed_of_pairs(tmp_path, tokenizer, monkeypatch, capsys):
    pairs = [
        {"prompt": f"Say {n % 37} please", "chosen": f"{n} is it" * (1 + n % 3), "rejected": f"no {n}"}
        for n in range(300)
    ]
    pairs[5]["rejected"] = pairs[5]["chosen"]
    write_pairs(tmp_path, pairs)
    monkeypatch.chdir(tmp_path)
    load_rows(data("pairs.jsonl", "dpo"), tokenizer, 256)
    (shown,) = re.findall(r"^```\n(pairs\.jsonl: .*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert shown == capsys.readouterr().out


def test_trained_tokens_are_counted_of_each_side():
    rows = Dataset.from_list(
        [
            {"labels": [IGNORED, 5, 6, IGNORED, IGNORED, 7], "seq_lengths": [3, 3], "signs": [1, -1]},
            {"labels": [IGNORED, 5, 6, 7, IGNORED, 7], "seq_lengths": [4, 2], "signs": [1, 1]},
        ]
    )
    assert Balance.of_rows(rows) == Balance(better=3, worse=1, better_tokens=6, worse_tokens=1)
    assert Balance(3, 1, 6, 1).lines("pairs") == [
        "  trained tokens, on average: 2 of a chosen one, 1 of a rejected one"
    ]
    assert Balance(3, 1, 6, 1).lines("rated") == [
        "  3 good answers and 1 bad ones; trained tokens, on average: 2 of a good one, 1 of a bad one"
    ]


@pytest.mark.parametrize(("label", "missing"), [(True, "bad"), (False, "good")])
def test_ratings_that_are_all_the_same_are_a_warning(tmp_path, tokenizer, capsys, label, missing):
    rows = [{"prompt": f"Question {n}", "completion": "Yes", "label": label} for n in range(20)]
    load_rows(data(write_pairs(tmp_path, rows), "kto"), tokenizer, 64)
    assert f"  warning: there is no {missing} answer, so nothing says what the others are" in capsys.readouterr().out


def test_pairs_in_both_orders_contradict_each_other(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"Question {n}", "chosen": "Yes", "rejected": "No"} for n in range(20)]
    source = write_pairs(tmp_path, rows)
    load_rows(data(source, "dpo", eval_rows=0), tokenizer, 64)
    assert "warning" not in capsys.readouterr().out
    turned = write_pairs(tmp_path, [*rows, rows[3] | {"chosen": "No", "rejected": "Yes"}])
    load_rows(data(turned, "dpo", eval_rows=0), tokenizer, 64)
    assert "  warning: 2 examples contradict another one" in capsys.readouterr().out


def test_an_answer_that_is_rated_both_ways_contradicts_itself_and_is_no_copy(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"Question {n % 19}", "completion": "Yes", "label": n < 19} for n in range(20)]
    loaded = load_rows(data(write_pairs(tmp_path, rows), "kto", eval_rows=0), tokenizer, 64)
    assert "  warning: 2 examples contradict another one" in capsys.readouterr().out
    assert loaded.reports[0].copies == 0
