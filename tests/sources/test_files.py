import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from common.recipe import UserError
from common.sources.files import read_rows
from common.sources.source_row import BadRow

ROWS = [{"prompt": "ä?", "completion": 'b, "c"\nd'}, {"prompt": "e", "completion": "f"}]


def write(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def kinds(source: str) -> list[str]:
    return [str(row) for _, row in read_rows(source) if isinstance(row, BadRow)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
    else:
        text = {
            "rows.jsonl": "\n".join(map(json.dumps, ROWS)),
            "rows.json": json.dumps(ROWS),
            "rows.csv": 'prompt,completion\nä?,"b, ""c""\nd"\ne,f\n',
        }[name]
        write(tmp_path, name, text)
    assert [row for _, row in read_rows(str(tmp_path / name))] == ROWS


def test_a_hub_data_set_gives_the_same_rows(tmp_path, monkeypatch):
    asked = {}

    def load_dataset(name, config, split, revision):
        asked.update(name=name, config=config, split=split, revision=revision)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    placed = list(read_rows("owner/chats", split="train_sft", revision="v2", config="main"))
    assert [row for _, row in placed] == ROWS
    assert placed[1][0] == "owner/chats [main, train_sft], row 2"
    assert asked == {"name": "owner/chats", "config": "main", "split": "train_sft", "revision": "v2"}


def test_places_name_file_and_line(tmp_path):
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\n\n{"text": \n{"text": "b"}\n')
    assert [place for place, _ in read_rows(source)] == [f"{source}:1", f"{source}:3", f"{source}:4"]


def test_bad_lines_come_as_bad_rows_and_the_rest_is_read(tmp_path):
    lines = [
        b'{"text": "ok"}',
        b"{broken",
        b'"text"',
        b'{"text": "\xff"}',
        b'{"n": NaN',
        b"[" * 100_000,
        b'{"text": "ok"}',
    ]
    source = write(tmp_path, "a.jsonl", b"\n".join(lines))
    not_utf8 = "not UTF-8; convert the file: iconv -f WINDOWS-1252 -t UTF-8"
    assert kinds(source) == ["invalid JSON", "not a JSON object", not_utf8, "invalid JSON", "invalid JSON"]
    assert len(list(read_rows(source))) == 7


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path):
    source = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [row for _, row in read_rows(source)] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16; convert it: iconv"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "is damaged (Truncated compressed stream)"),
        ("a.json", b"[]\n[]", "a.json:2: invalid JSON: Extra data; write one list of objects, or one object a line"),
        ("a.json", b'{"text": "a"}', "holds one object; a .json file is a list"),
        ("a.json", b"[\xff]", "is not UTF-8"),
        ("a.csv", b'text\n"a" b\n', "a.csv:2: broken CSV"),
        ("a.parquet", b"PAR1....", "is not a readable Parquet file"),
        (
            "a.md",
            b"text",
            "is no data file by its name; a name ends in .jsonl, .json, .csv, .tsv, .txt (each also with",
        ),
    ],
)
def test_a_source_that_cannot_be_read_says_why(tmp_path, name, content, message):
    source = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        list(read_rows(source))
    assert message in str(error.value)


def test_a_csv_row_of_another_length_is_named(tmp_path):
    source = write(tmp_path, "a.csv", "prompt,completion\na,b\nc\nd,e,f\n")
    assert kinds(source) == ["a CSV row of another length than the header"] * 2


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no data file nowhere.jsonl"):
        list(read_rows("nowhere.jsonl"))
    with pytest.raises(UserError, match="the folder .* has no data files"):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("no"), "the hub has no data set owner/x that you may read"),
        (
            ValueError("Unknown split \"tran\". Should be one of ['train']."),
            "data set owner/x has no split 'tran'; set DataSpec(split=...), or eval_split for",
        ),
        (ConnectionError("no route"), "the hub cannot be reached"),
    ],
)
def test_hub_trouble_is_one_line(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as raised:
        list(read_rows("owner/x"))
    assert message in str(raised.value)
