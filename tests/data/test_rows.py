import json
from dataclasses import replace

import datasets
import pytest

from common.data.rows import load_rows
from common.recipe import DataSpec, UserError


def conversation(user: str = "Hello", assistant: str = "Hi") -> str:
    return json.dumps({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})


def write(folder, *lines: str) -> str:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_held_out_rows_are_not_trained(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation(f"Question number {n}") for n in range(100)])
    rows = load_rows(DataSpec(source, eval_rows=7), tokenizer, 64, seed=3)

    def examples(packed):
        for row in packed:
            start = 0
            for length in row["seq_lengths"]:
                yield tuple(row["input_ids"][start : start + length])
                start += length

    train, held_out = set(examples(rows.train)), set(examples(rows.evaluation))
    assert (len(train), len(held_out)) == (93, 7)
    assert not train & held_out
    again = load_rows(DataSpec(source, eval_rows=7), tokenizer, 64, seed=3)
    assert set(examples(again.evaluation)) == held_out


def test_a_hub_data_set_may_hold_its_own_split_out(tokenizer, monkeypatch):
    def load_dataset(name, split, revision):
        return datasets.Dataset.from_list([{"prompt": split, "completion": str(n)} for n in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows(DataSpec("owner/chats", eval_source="owner/chats", eval_split="test"), tokenizer, 64)
    for packed, split, other in ((rows.train, "train", "test"), (rows.evaluation, "test", "train")):
        text = tokenizer.decode(sum(packed["input_ids"], []))
        assert f"<|user|>{split}<|end|>" in text and f"<|user|>{other}<|end|>" not in text


def test_at_most_a_tenth_is_held_out(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation(f"Question {n}") for n in range(30)])
    rows = load_rows(DataSpec(source, eval_rows=200), tokenizer, 64)
    assert sum(map(len, rows.evaluation["seq_lengths"])) == 3


def test_pitfall_34_rows_whose_answers_do_not_fit_are_refused(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation("word " * 200)] * 10)
    with pytest.raises(UserError, match="its first answer ends after 64 tokens"):
        load_rows(DataSpec(source), tokenizer, 64)


def test_train_on_everything(tmp_path, tokenizer):
    spec = DataSpec(write(tmp_path, *[conversation()] * 20), eval_rows=0)
    part = load_rows(spec, tokenizer, 64).reports[0]
    whole = load_rows(replace(spec, train_on="everything"), tokenizer, 64).reports[0]
    assert part.trained_tokens < whole.trained_tokens == whole.tokens - 20


def test_held_out_examples_of_its_own_source_that_are_trained_too_are_counted_and_said(tmp_path, tokenizer, capsys):
    source = write(tmp_path, *[conversation(f"Question {n % 50}") for n in range(100)])
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(conversation(question) for question in ("Question 7", "Question 7", "Another")))
    load_rows(DataSpec(source, eval_source=str(own)), tokenizer, 64)
    assert "  warning: 2 of the 3 held-out examples are also among the training ones" in capsys.readouterr().out


def test_held_out_examples_that_are_not_trained_are_no_warning(tmp_path, tokenizer, capsys):
    source = write(tmp_path, *[conversation(f"Question {n}") for n in range(100)])
    load_rows(DataSpec(source, eval_rows=10), tokenizer, 64)
    assert "warning" not in capsys.readouterr().out
