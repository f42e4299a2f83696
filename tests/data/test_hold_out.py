"""What is held out is trained on in no form: no copy of it, and no other piece of its row."""

import json

import pytest

from common.data.rows import load_rows
from common.recipe import DataSpec
from common.tokens.chat_format import Tokens
from tests.data.test_rows import conversation, write
from tests.sources.test_other_kind import data


def examples(packed) -> list[tuple[int, ...]]:
    found = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            found.append(tuple(row["input_ids"][start : start + length]))
            start += length
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_row_with_copies_is_held_out_with_all_of_them_or_not_at_all(tmp_path, tokenizer, seed, capsys):
    source = write(tmp_path, *[conversation(f"Question {n % 50}") for n in range(100)])
    rows = load_rows(DataSpec(source, eval_rows=10), tokenizer, 64, seed)
    held_out, trained = examples(rows.evaluation), examples(rows.train)
    assert (len(held_out), len(set(held_out)), len(trained)) == (10, 5, 90)
    assert not set(held_out) & set(trained)
    assert "warning" not in capsys.readouterr().out


def test_a_row_with_more_copies_than_may_be_held_out_is_trained(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation("The same") for _ in range(60)], *[conversation(f"{n}") for n in range(40)])
    rows = load_rows(DataSpec(source, eval_rows=10), tokenizer, 64)
    held_out = examples(rows.evaluation)
    assert len(held_out) == 10 and not set(held_out) & set(examples(rows.train))


def test_copies_in_another_source_of_a_mixture_count_too(tmp_path, tokenizer):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text("\n".join(conversation(f"Question {n}") for n in range(100)))
    spec = DataSpec(sources=tuple((str(path), 1) for path in paths), eval_rows=20)
    rows = load_rows(spec, tokenizer, 64)
    held_out = examples(rows.evaluation)
    assert len(held_out) > 10 and not set(held_out) & set(examples(rows.train))


@pytest.mark.parametrize("seed", range(5))
def test_the_pieces_of_a_text_never_fall_on_both_sides(tmp_path, tokenizer, seed):
    texts = [f"{name} " * 100 for name in ("paint", "roof", "remind", "thursday", "task", "time", "day", "tool")]
    lines = [json.dumps({"text": text}) for text in texts]
    lines += [json.dumps({"text": f"Short {n}"}) for n in range(100)]
    rows = load_rows(DataSpec(write(tmp_path, *lines), eval_rows=12), tokenizer, 32, seed)
    held_out = " ".join(tokenizer.decode(list(ids)) for ids in examples(rows.evaluation))
    trained = " ".join(tokenizer.decode(list(ids)) for ids in examples(rows.train))
    assert len(examples(rows.evaluation)) <= 12
    for text in texts:
        word = text.split()[0]
        assert (word in held_out) != (word in trained), word


def test_a_single_document_is_trained_whole_and_a_line_says_that_nothing_is_held_out(tmp_path, tokenizer, capsys):
    source = write(tmp_path, json.dumps({"text": " ".join(f"number {n}" for n in range(2000))}))
    rows = load_rows(DataSpec(source), tokenizer, 64)
    assert rows.evaluation is None
    assert "  nothing is held out: at most a tenth of the examples would be" in capsys.readouterr().out
    load_rows(DataSpec(source, eval_rows=0), tokenizer, 64)
    assert "nothing is held out" not in capsys.readouterr().out


def test_copies_are_counted_in_the_report(tmp_path, tokenizer, capsys):
    source = write(tmp_path, *[conversation(f"Question {n % 40}") for n in range(100)])
    report = load_rows(DataSpec(source), tokenizer, 64).reports[0]
    assert report.copies == 60
    assert "  60 examples are exact copies of another one" in capsys.readouterr().out


def prompts_of(packed) -> set[tuple[int, ...]]:
    """Of rows of one example each."""
    return {tuple(Tokens(row["input_ids"], row["labels"], []).prompt()) for row in packed}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_all_that_answer_a_prompt_are_held_out_together(tmp_path, tokenizer, seed, loss):
    answers = {"chosen": "Yes", "rejected": "No"} if loss == "dpo" else {"completion": "Yes", "label": True}
    first = next(iter(answers))
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Question {n % 50}", **answers, first: f"Yes {n}"} for n in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = data(str(path), loss, eval_rows=10)
    loaded = load_rows(spec, tokenizer, 40 if loss == "dpo" else 20, seed)  # one example a row
    held_out, trained = prompts_of(loaded.evaluation), prompts_of(loaded.train)
    assert (len(loaded.evaluation), len(loaded.train)) == (10, 90)
    assert (len(held_out), len(trained)) == (5, 45) and not held_out & trained


def test_a_held_out_source_with_prompts_that_are_trained_is_said(tmp_path, tokenizer, capsys):
    paths = [tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"]
    for path, first in zip(paths, (0, 18), strict=True):
        answers = {"chosen": f"Yes {path.stem}", "rejected": "No"}
        path.write_text("\n".join(json.dumps({"prompt": f"Question {first + n}", **answers}) for n in range(20)))
    load_rows(data(str(paths[0]), "dpo", eval_source=str(paths[1])), tokenizer, 64)
    warning = "  warning: 2 of the 20 held-out examples answer a prompt that is also among the training ones"
    assert warning in capsys.readouterr().out
