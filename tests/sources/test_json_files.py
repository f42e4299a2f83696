"""JSON under the name of the other of its two layouts, and texts that a line must not be cut at."""

import json

import pytest

from common.conversations.row_reader import RowReader
from common.recipe import UserError
from common.sources import json_files
from common.sources.files import read_rows
from common.sources.source_row import BadRow
from tests.sources.test_files import write

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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"data": ROWS, "version": 1},
            r"keys 'data', 'version'; .*Its 'data' is such a list: .*jq -c '\.\[\"data\"\]\[\]' ",
        ),
        ({"train": ROWS, "test": ROWS}, r"keys 'train', 'test'; a \.json file is a list of objects; .* is \.jsonl$"),
        ({"ids": [1, 2]}, r"keys 'ids'; a \.json file is a list of objects; one object a line is \.jsonl$"),
        ("text", "holds one value that is no list; a .json file is a list of objects"),
    ],
    ids=["rows in one key", "rows in two", "no rows", "a text"],
)
def test_json_that_is_no_list_says_what_it_is_and_where_the_rows_may_be(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        list(read_rows(write(tmp_path, "a.json", json.dumps(content, indent=1))))


CALL = """{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
    {"type": "function", "function": {"name": "f", "arguments": %s}}]}]}""".replace("\n", "")
UNREAD = [
    '"score": NaN',
    '"score": [1, {"a": -Infinity}]',
    '"score": 1, "score": 2',
    '"score": {"a": 1, "a": 2}',
    '"Score": Infinity, "other": NaN',
]


@pytest.mark.parametrize("unread", UNREAD)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_value_that_no_format_reads_may_be_anything(unread, name, tmp_path):
    row = f'{{"prompt": "a", {unread}, "completion": "b"}}'
    content = f"[{row}, {row}]" if name == "a.json" else f"{row}\n{row}\n"
    reader = RowReader()
    for _, found in read_rows(write(tmp_path, name, content)):
        assert [message.content for message in reader.read(found).messages] == ["a", "b"]


@pytest.mark.parametrize("unread", UNREAD)
def test_a_field_of_a_message_that_no_format_reads_too(unread, tmp_path):
    user, answer = f'{{"role": "user", {unread}, "content": "a"}}', f'{{"role": "assistant", "content": "b", {unread}}}'
    ((_, found),) = read_rows(write(tmp_path, "a.jsonl", f'{{"messages": [{user}, {answer}]}}'))
    assert [message.content for message in RowReader().read(found).messages] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ('{"text": NaN}', "NaN and Infinity are not JSON; write null"),
        ('{"text": "a", "text": "a"}', "a key occurs twice in a JSON object"),
        ('{"prompt": Infinity, "completion": "b"}', "NaN and Infinity"),
        ('{"instruction": "a", "input": NaN, "output": "b"}', "NaN and Infinity"),
        ('{"messages": NaN}', "NaN and Infinity"),
        ('{"messages": [], "messages": []}', "a key occurs twice"),
        ('{"messages": [{"role": NaN, "content": "a"}]}', "NaN and Infinity"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "a key occurs twice"),
        ('{"conversations": [{"from": "human", "value": NaN}]}', "NaN and Infinity"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": NaN}]}]}', "NaN and Infinity"),
        ('{"prompt": "a", "completion": "b", "system": NaN}', "NaN and Infinity"),
        ('{"prompt": "a", "completion": "b", "weight": NaN}', "NaN and Infinity"),
        ('{"prompt": "a", "completion": "b", "weight": 0, "weight": 1}', "a key occurs twice"),
        ('{"prompt": "a", "completion": "b", "label": true, "label": false}', "a key occurs twice"),
        ('{"prompt": "a", "completion": "b", "history": NaN}', "NaN and Infinity are not JSON"),
        ('{"prompt": "a", "completion": "b", "chat_template_kwargs": {"depth": NaN}}', "NaN and Infinity"),
        ('{"prompt": "a", "completion": "b", "tools": [{"name": "f", "parameters": {"minimum": NaN}}]}', "NaN and"),
        ('{"prompt": "a", "completion": "b", "tools": [{"name": "f", "name": "g"}]}', "a key occurs twice"),
        (CALL % '{"x": NaN}', "NaN and Infinity"),
        (CALL % '{"x": 1, "x": 2}', "a key occurs twice"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_one_that_is_read_is_a_fault_of_its_row_by_name(row, fault, name, tmp_path):
    content = f"[{row}]" if name == "a.json" else row
    ((_, found),) = read_rows(write(tmp_path, name, content))
    with pytest.raises(BadRow, match=fault):
        RowReader().read(found)
