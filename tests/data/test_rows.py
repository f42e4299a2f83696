import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from common.data.rows import find_examples, load_rows
from common.recipe import DataSpec, UserError
from tests.sources.test_other_kind import data


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
    def load_dataset(name, config, split, revision):
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


def test_columns_of_a_recipe_are_those_of_both_sources(tmp_path, tokenizer):
    paths = [tmp_path / name for name in ("train.jsonl", "held_out.jsonl")]
    for path in paths:
        path.write_text("".join(json.dumps({"frage": f"{path.stem} {n}", "antwort": "ja"}) + "\n" for n in range(9)))
    columns = {"user": "frage", "assistant": "antwort"}
    rows = load_rows(DataSpec(str(paths[0]), eval_source=str(paths[1]), columns=columns), tokenizer, 64)
    assert [report.kept for report in rows.reports] == [9, 9]
    assert "<|user|>train 3<|end|><|assistant|>ja<|end|>" in tokenizer.decode(sum(rows.train["input_ids"], []))


def test_one_row_with_a_preference_refuses_the_source(tmp_path, tokenizer):
    labelled = json.dumps(json.loads(conversation()) | {"label": False})
    source = write(tmp_path, *[conversation()] * 500, labelled)
    with pytest.raises(UserError, match="chats.jsonl:501: this is preference data"):
        load_rows(DataSpec(source, max_bad_share=1), tokenizer, 64)


def pairs_of_messages(count: int = 20) -> list[dict]:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    return [
        {
            "prompt": [turn("user", f"Question {n}")],
            "chosen": [turn("assistant", f"Yes {n}")],
            "rejected": [turn("assistant", f"No {n}")],
        }
        for n in range(count)
    ]


def as_texts(pairs: list[dict]) -> list[dict]:
    return [{key: messages[0]["content"] for key, messages in pair.items()} for pair in pairs]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "folder", "csv", "jsonl.gz", "hub"])
def test_pairs_of_every_kind_of_file_and_of_the_hub_are_the_same_rows(tmp_path, tokenizer, monkeypatch, kind):
    pairs, path = pairs_of_messages(), str(tmp_path / f"pairs.{kind}")
    table = datasets.Dataset.from_list(pairs)
    texts = datasets.Dataset.from_list(as_texts(pairs))
    expected_source = tmp_path / "expected.jsonl"
    expected_source.write_text("\n".join(map(json.dumps, as_texts(pairs))))
    write_as = {
        "jsonl": lambda: table.to_json(path),
        "json": lambda: Path(path).write_text(json.dumps(pairs)),
        "parquet": lambda: table.to_parquet(path),
        "arrow": lambda: table.save_to_disk(str(tmp_path / "saved")),
        "folder": lambda: table.save_to_disk(path),
        "csv": lambda: texts.to_csv(path),
        "jsonl.gz": lambda: Path(path).write_bytes(gzip.compress("\n".join(map(json.dumps, pairs)).encode())),
        "hub": lambda: monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table),
    }
    write_as[kind]()
    if kind == "arrow":
        (path,) = map(str, (tmp_path / "saved").glob("*.arrow"))
    source = "owner/pairs" if kind == "hub" else path
    rows, expected = (load_rows(data(name, "dpo"), tokenizer, 64) for name in (source, str(expected_source)))
    assert rows.train.to_list() == expected.train.to_list()
    assert rows.evaluation.to_list() == expected.evaluation.to_list()


def test_rated_answers_of_a_table_have_their_ratings(tmp_path, tokenizer):
    table = [
        {"messages": [*pair["prompt"], *pair["chosen"]], "label": n % 2} for n, pair in enumerate(pairs_of_messages())
    ]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "rated.parquet")
    rows = load_rows(data(str(tmp_path / "rated.parquet"), "kto", eval_rows=0), tokenizer, 64)
    assert sorted(sum(rows.train["signs"], [])) == [-1] * 10 + [1] * 10
    assert len(sum(rows.train["seq_lengths"], [])) == 20


def test_the_place_of_one_answer_is_that_of_its_pair(tmp_path, tokenizer):
    source = write(tmp_path, *map(json.dumps, pairs_of_messages()))
    spec = data(source, "dpo", eval_rows=0)
    row = load_rows(spec, tokenizer, 64).train[1]
    first, second = row["seq_lengths"][:2]
    text = tokenizer.decode(row["input_ids"][first : first + second])
    number = int(text.split("Question ")[1].split("<")[0])
    for ids in (row["input_ids"][:first], row["input_ids"][first : first + second]):
        assert find_examples(spec, tokenizer, 64, [ids]) == [f"{source}:{number + 1}"]


def test_faults_of_pairs_are_named_by_file_and_line(tmp_path, tokenizer):
    pairs = as_texts(pairs_of_messages(40))
    pairs[7]["rejected"], pairs[11]["chosen"] = pairs[7]["chosen"], ""
    source = write(tmp_path, *map(json.dumps, pairs))
    with pytest.raises(UserError, match="2 of 40 rows of .* cannot be used") as error:
        load_rows(data(source, "dpo"), tokenizer, 64)
    report = error.value.report
    assert report.faults.places == {
        "its two answers are the same": [f"{source}:8"],
        "chosen is empty": [f"{source}:12"],
    }
