"""Every row of a source is counted; the faults are named with their places."""

import json

import pytest

from common.conversations.conversation import Conversation, Message
from common.conversations.row_reader import RowReader
from common.data.packing import TooLong
from common.data.report import DataReport, mark_trained
from common.data.rows import load_rows
from common.recipe import DataSpec, UserError
from common.sources.source_row import BadRow, NotToLearn
from common.tokens.chat_format import ChatFormat, Tokens
from tests.conftest import ROOT
from tests.data.test_rows import conversation, write


def test_the_report_counts_and_names_every_row(tmp_path, tokenizer, capsys):
    lines = [conversation(f"Hello {n}") for n in range(50)]
    lines[7], lines[9], lines[30] = "{", "{", conversation(assistant="")
    source = write(tmp_path, *lines)
    rows = load_rows(DataSpec(source, eval_rows=0, max_bad_share=0.1), tokenizer, 128)
    out = capsys.readouterr().out
    assert "50 rows read (messages), 47 kept, 3 dropped" in out
    assert f"dropped 2: invalid JSON ({source}:8; {source}:10)" in out
    assert f"dropped 1: the assistant's text is empty ({source}:31)" in out
    report = rows.reports[0]
    assert (report.read, report.kept, report.dropped) == (50, 47, 3)
    assert rows.train_tokens == report.tokens
    assert "⟦" in out and "<|end|>⟧" in out


def test_rows_that_tell_no_format_have_none_in_the_report(tmp_path, tokenizer, capsys):
    with pytest.raises(UserError):
        load_rows(DataSpec(write(tmp_path, "{", "{")), tokenizer, 128)
    assert "2 rows read, 0 kept, 2 dropped" in capsys.readouterr().out


def test_more_than_one_percent_bad_rows_stop_the_run(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation()] * 97, "{", "{", "{")
    with pytest.raises(UserError) as error:
        load_rows(DataSpec(source), tokenizer, 128)
    assert f"3 of 100 rows of {source} cannot be used (3.0%, limit 1.0%)" in str(error.value)
    assert f"invalid JSON ({source}:98 and 2 more)" in str(error.value)


def test_one_percent_bad_rows_do_not(tmp_path, tokenizer):
    assert load_rows(DataSpec(write(tmp_path, *[conversation()] * 99, "{")), tokenizer, 128).reports[0].dropped == 1


def test_a_source_without_rows_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="holds no rows"):
        load_rows(DataSpec(write(tmp_path, "")), tokenizer, 128)


def test_marked_shows_what_is_trained(tokenizer):
    example = ChatFormat(tokenizer).encode(Conversation((Message("user", "Hello"), Message("assistant", "Hi\nyou"))))
    assert mark_trained(example, tokenizer) == "<s><|user|>Hello<|end|><|assistant|>⟦Hi⏎you<|end|>⟧"


def test_a_blank_that_is_trained_is_shown(real_tokenizer):
    mistral = real_tokenizer("mistral_v3", (ROOT / "models" / "chat_templates" / "mistral_v3.jinja").read_text())
    tokens = ChatFormat(mistral).encode(Conversation((Message("user", "Hello"), Message("assistant", "Hi"))))
    assert mark_trained(tokens, mistral) == "<s>[INST] Hello[/INST]⟦ Hi</s>⟧"


def test_an_example_shows_what_a_terminal_would_obey(tokenizer):
    text = "a\x1b[31mb\x00\u202ec 👩\u200d💻\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = mark_trained(Tokens(ids, ids, [len(ids)]), tokenizer)
    assert shown == "⟦a\\x1b[31mb\\x00\\u202ec 👩\u200d💻⏎⟧"


def test_rows_that_say_not_to_learn_them_are_counted_apart(tmp_path, tokenizer, capsys, monkeypatch):
    def read(self, row):
        if row["prompt"] == "no":
            raise NotToLearn("its weight is 0")
        return ordinary_read(self, row)

    ordinary_read = RowReader.read
    monkeypatch.setattr(RowReader, "read", read)
    rows = [{"prompt": f"{n}" if n % 4 else "no", "completion": "a"} for n in range(40)]
    source = write(tmp_path, *map(json.dumps, rows))
    report = load_rows(DataSpec(source, eval_rows=0, max_bad_share=0), tokenizer, 64).reports[0]
    assert (report.kept, report.dropped, report.not_to_learn.total) == (30, 0, 10)
    said = capsys.readouterr().out
    assert "40 rows read (prompt/completion), 30 kept, 0 dropped, 10 not to be learnt" in said
    assert f"  not to be learnt 10: its weight is 0 ({source}:1; {source}:5; " in said and " and 5 more)" in said
    monkeypatch.setattr(RowReader, "read", lambda self, row: read(self, row | {"prompt": "no"}))
    with pytest.raises(UserError, match="says of all its rows not to learn them: its weight is 0"):
        load_rows(DataSpec(source), tokenizer, 64)


def test_notes_and_unread_columns_are_said_with_their_rows(tmp_path, tokenizer, capsys):
    def row(number: int) -> str:
        messages = [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "a"}]
        messages += [{"role": "user", "content": "Thanks"}] * (number < 3)
        messages[0] |= {"name": "Ann"} if number == 3 else {}
        return json.dumps({"id": number + 1, "messages": messages})

    source = write(tmp_path, *[row(number) for number in range(20)])
    report = load_rows(DataSpec(source, eval_rows=0), tokenizer, 64).reports[0]
    assert report.unread == {"id": 20, "messages[].name": 1}
    assert report.notes == {"what follows the last answer is left out": 3}
    said = capsys.readouterr().out
    assert "  not read: id (20 rows), messages[].name (1 row)" in said
    assert "  3 rows: what follows the last answer is left out" in said


def test_a_report_is_the_same_after_it_was_stored_as_json():
    report = DataReport("a.jsonl", 64, format_name="messages", read=9, kept=4, sha256="0" * 64)
    report.add_unused(BadRow("invalid JSON"), "a.jsonl:3")
    report.add_unused(TooLong("too long"), "a.jsonl:4")
    report.add_unused(NotToLearn("its weight is 0"), "a.jsonl:5")
    report.add_length(100)
    report.unread["id"], report.notes["a note"] = 4, 2
    again = DataReport.from_record(json.loads(json.dumps(report.record())))
    assert again == report and again.lines() == report.lines()
