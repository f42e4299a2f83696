"""The texts on which drift is measured: the ones that ship, and a user's own."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from common.recipe import DataSpec, UserError
from common.run import general_texts
from common.run.general_texts import load_general_texts, refuse_missing_texts, texts_if_there
from tests.conftest import ROOT

GENERAL = str(ROOT / "data" / "general.jsonl")
CHAT = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning!"}]}


@pytest.fixture
def write(tmp_path):
    def write(*rows: object) -> str:
        path = tmp_path / "own.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(path)

    return write


def scored(texts) -> int:
    """Tokens with a label, but for the first of each packed row, which has none before it."""
    return sum(label != -100 for row in texts.rows for label in row["labels"][1:])


def test_the_texts_that_ship_are_many_short_and_varied(real_tokenizer):
    """At most 8,000 tokens with Llama 3's tokenizer, so that a run reads them in seconds."""
    rows = [json.loads(line) for line in Path(GENERAL).read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 100 and len({json.dumps(row) for row in rows}) == len(rows)
    turns = Counter(len(row.get("messages", [])) for row in rows)
    assert turns[0] >= 25 and turns[2] >= 50 and turns[4] >= 8  # texts, answers, dialogues of two turns
    letters = " ".join(
        unicodedata.name(letter, "NONE").split()[0] for letter in set(json.dumps(rows, ensure_ascii=False))
    )
    for script in ("LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL"):
        assert script in letters
    assert sum("```" in json.dumps(row) for row in rows) >= 5  # code
    assert sum(bool(re.search(r"\d [-+×*/=] \d", json.dumps(row, ensure_ascii=False))) for row in rows) >= 5  # sums
    tokenizer = real_tokenizer("smollm2")
    texts = load_general_texts(GENERAL, tokenizer, 2048)
    assert (texts.texts, texts.left_out) == (len(rows), 0)
    assert sum(len(row["input_ids"]) for row in texts.rows) <= 14_000  # SmolLM2's vocabulary is English


def test_rows_of_several_formats_are_scored_as_in_training(write, tokenizer):
    """Of a conversation the assistant's tokens, with the token that ends its turn; of a text all but the first."""
    texts = load_general_texts(write(CHAT, {"text": "a plain text"}, {"prompt": "a", "completion": "b"}), tokenizer, 64)
    answer = len(tokenizer("Good morning!<|end|>", add_special_tokens=False)["input_ids"])
    plain = len(tokenizer("a plain text", add_special_tokens=False)["input_ids"])
    assert (texts.texts, texts.left_out) == (3, 0)
    assert scored(texts) == answer + plain + 1 + 2  # the text begins with BOS and ends with EOS


def test_rows_that_the_template_refuses_are_left_out_and_said(write, tokenizer, capsys):
    tokenizer = type(tokenizer).from_pretrained(ROOT / "models" / "tiny")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}"
        + tokenizer.chat_template
    )
    with_system = {"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]}
    texts = load_general_texts(write(with_system, CHAT, {"text": "a plain text"}), tokenizer, 64)
    assert (texts.texts, texts.left_out) == (2, 1)
    out = capsys.readouterr().out
    assert out.startswith("off the task: 1 of 3 rows of ") and "no system message here" in out
    assert out.count("\n") == 1


def test_a_base_model_without_a_template_reads_the_texts_alone(write, tokenizer, capsys):
    tokenizer = type(tokenizer).from_pretrained(ROOT / "models" / "tiny")
    tokenizer.chat_template = None
    texts = load_general_texts(write(CHAT, {"text": "a plain text"}), tokenizer, 64)
    assert (texts.texts, texts.left_out) == (1, 1)
    assert "the model has no chat template" in capsys.readouterr().out


def test_too_long_rows_are_cut_as_in_training(write, tokenizer, capsys):
    long = {"messages": [*CHAT["messages"], {"role": "user", "content": "x" * 200}, CHAT["messages"][1]]}
    texts = load_general_texts(write(long, {"text": "one two three " * 30}), tokenizer, 32)
    assert texts.texts == 2 and max(len(row["input_ids"]) for row in texts.rows) <= 32
    assert capsys.readouterr().out == ""


def test_of_a_large_file_the_first_rows_are_read(write, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(general_texts, "MAX_DRIFT_TOKENS", 50)
    texts = load_general_texts(write(*[{"text": f"text {n} of many"} for n in range(500)]), tokenizer, 64)
    assert 50 <= sum(len(row["input_ids"]) for row in texts.rows) < 70
    assert f"the first {texts.texts} rows are read" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_an_error_that_names_the_field(tokenizer):
    for call in (refuse_missing_texts, lambda source: load_general_texts(source, tokenizer, 64)):
        with pytest.raises(UserError, match=r"no data file nowhere\.jsonl .* DataSpec\.drift_source.* None to measure"):
            call("nowhere.jsonl")
    refuse_missing_texts(None)
    refuse_missing_texts("owner/name")  # of the hub


def test_rows_of_which_none_can_be_used_are_an_error(write, tokenizer):
    with pytest.raises(UserError, match="no row of .*own.jsonl .* can be used to measure drift: no format has these"):
        load_general_texts(write({"a": 1}), tokenizer, 64)


def test_make_eval_goes_on_without_them(tokenizer, capsys):
    assert texts_if_there(None, tokenizer, 64) is None
    assert capsys.readouterr().out == ""
    assert texts_if_there("nowhere.jsonl", tokenizer, 64) is None
    assert "not measured: there is no data file nowhere.jsonl" in capsys.readouterr().out


def test_the_default_is_there():
    assert (ROOT / str(DataSpec("x").drift_source)).exists()
