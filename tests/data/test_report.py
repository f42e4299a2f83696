"""Every row of a source is counted; the faults are named with their places."""

import pytest

from common.data.chat_format import ChatFormat, Tokens
from common.data.conversation import Conversation, Message
from common.data.report import mark_trained
from common.data.rows import load_rows
from common.recipe import DataSpec, UserError
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


def test_an_example_shows_what_a_terminal_would_obey(tokenizer):
    text = "a\x1b[31mb\x00\u202ec 👩\u200d💻\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = mark_trained(Tokens(ids, ids, [len(ids)]), tokenizer)
    assert shown == "⟦a\\x1b[31mb\\x00\\u202ec 👩\u200d💻⏎⟧"
