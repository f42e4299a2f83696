"""JSON under the name of the other of its two layouts, and texts that a line must not be cut at."""

import json

import pytest

from common.data import json_files
from common.data.files import read_rows
from common.recipe import UserError
from tests.data.test_files import write

ROWS = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=2)),
        ("a.jsonl", "\ufeff \r\n" + json.dumps(ROWS, indent=2)),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n'),
        ("a.json", '\ufeff\n{"text": "a"}\r\n\r\n{"text": "b"}'),
    ],
    ids=["a list on one line", "a pretty list", "a pretty list with a mark", "lines", "lines with a mark and CRLF"],
)
def test_the_layout_is_what_the_file_holds_and_not_its_name(tmp_path, name, content):
    assert [row for _, row in read_rows(write(tmp_path, name, content))] == ROWS


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d", "a\0b", "a\rb", "👩‍👩‍👧", "\u202eabc", "日本"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_text_is_taken_as_it_stands(tmp_path, name, text):
    content = f"{json.dumps({'text': text}, ensure_ascii=False)}\n" * 2
    assert [row for _, row in read_rows(write(tmp_path, name, content))] == [{"text": text}] * 2


def test_a_list_in_jsonl_that_is_too_large_says_how_to_write_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LIST_BYTES", 10)
    with pytest.raises(UserError, match=r"is one list of more than 0 MiB, .* jq -c '\.\[\]' .*a\.jsonl > lines\.jsonl"):
        list(read_rows(write(tmp_path, "a.jsonl", json.dumps(ROWS))))
