"""What a source names: a file, several, a glob, a folder of shards; and what is refused because it says two things."""

import json
from pathlib import Path

import pytest

from common.conversations.row_reader import RowReader
from common.data.rows import load_rows
from common.recipe import DataSpec, UserError
from common.sources.files import ROW_READERS, TABLE_READERS, read_rows
from common.sources.source_files import SUFFIXES, find_files, is_file
from tests.conftest import TRAIN


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(*names: str) -> None:
    """Writes a file for each name, with its name as the text of its only row."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        as_csv = name.endswith((".csv", ".tsv"))
        Path(name).write_text(f"text\n{name}\n" if as_csv else json.dumps({"text": name}) + "\n")


def texts(source: str) -> list[str]:
    return [row["text"] for _, row in read_rows(source)]


def refusal(source: str) -> str:
    with pytest.raises(UserError) as error:
        list(read_rows(source))
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("b.jsonl a.jsonl", ["b.jsonl", "a.jsonl"]),
        ("  a.jsonl\t b.jsonl ", ["a.jsonl", "b.jsonl"]),
        ("a.jsonl 'my chats.jsonl'", ["a.jsonl", "my chats.jsonl"]),
        (r"my\ chats.jsonl b.jsonl", ["my chats.jsonl", "b.jsonl"]),
        ("'my chats.jsonl'", ["my chats.jsonl"]),
        ("my chats.jsonl", ["my chats.jsonl"]),
        ("a b.jsonl", ["a b.jsonl"]),
        ("it's.jsonl", ["it's.jsonl"]),
        ("a[1].jsonl", ["a[1].jsonl"]),
        ("parts/*.jsonl", ["parts/p1.jsonl", "parts/p2.jsonl", "parts/p10.jsonl"]),
        ("parts/p?.jsonl b.jsonl", ["parts/p1.jsonl", "parts/p2.jsonl", "b.jsonl"]),
        ("**/p1*.jsonl", ["parts/p1.jsonl", "parts/p10.jsonl"]),
        ("parts", ["parts/p1.jsonl", "parts/p2.jsonl", "parts/p10.jsonl"]),
        ("parts/", ["parts/p1.jsonl", "parts/p2.jsonl", "parts/p10.jsonl"]),
        ("a.jsonl c.csv d.tsv", ["a.jsonl", "c.csv", "d.tsv"]),
        ("~/a.jsonl ~/b.jsonl", ["a.jsonl", "b.jsonl"]),
        ("~/parts/*1*.jsonl", ["parts/p1.jsonl", "parts/p10.jsonl"]),
    ],
)
def test_a_source_is_read_as_a_shell_would(source, names, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    write_files("a.jsonl", "b.jsonl", "c.csv", "d.tsv", "my chats.jsonl", "a b.jsonl", "it's.jsonl", "a[1].jsonl")
    write_files("parts/p1.jsonl", "parts/p2.jsonl", "parts/p10.jsonl")
    assert texts(source) == names


def test_a_path_that_exists_is_one_file_whatever_its_name(folder):
    write_files("a.jsonl", "b.jsonl", "a.jsonl b.jsonl")
    assert texts("a.jsonl b.jsonl") == ["a.jsonl b.jsonl"]


def test_a_place_names_its_own_file(folder):
    write_files("a.jsonl", "b.jsonl")
    Path("b.jsonl").write_text('{"text": "b"}\n{broken\n')
    assert [place for place, _ in read_rows("a.jsonl b.jsonl")] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]


def test_many_names_are_not_one_long_name(folder):
    names = [f"a-rather-long-name-of-a-file-{number}.jsonl" for number in range(20)]
    write_files(*names)
    assert texts(" ".join(names)) == names


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "a.jsonl none.jsonl",
            "there is no data file none.jsonl, one of the 2 files in 'a.jsonl none.jsonl' (looked in",
        ),
        ("my rows.jsonl", "there is no data file my, one of the 2 files in 'my rows.jsonl'"),
        ("my rows.jsonl", "; a name with blanks stands in quotes"),
        ("John's rows.jsonl", "there is no data file John's rows.jsonl (looked in"),
        ("a.jsonl owner/set", "there is no data file owner/set, one of the 2 files in"),
        (
            "a.jsonl parts",
            "parts, one of the 2 files in 'a.jsonl parts', is a folder; name its files, as in parts/*.jsonl",
        ),
        ("none/*.jsonl", "no file fits 'none/*.jsonl' (looked in"),
        ("a.jsonl *.csv", "no file fits '*.csv', one of the 2 files in 'a.jsonl *.csv'"),
        ("*", "parts is a folder; name its files, as in parts/*.jsonl"),
        ("a.jsonl ./a.jsonl", "a.jsonl is named twice in 'a.jsonl ./a.jsonl'; leave one of the two"),
        ("*.jsonl a.jsonl", "a.jsonl is named twice in"),
        ("link.jsonl a.jsonl", "a.jsonl is named twice in"),
        ("a.jsonl b.xlsx", "b.xlsx is a spreadsheet; save it as CSV in UTF-8"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(source, message, folder):
    write_files("a.jsonl", "b.xlsx", "parts/p1.jsonl")
    Path("link.jsonl").symlink_to("a.jsonl")
    assert message in refusal(source)


def test_no_row_is_read_where_a_file_of_the_source_is_none(folder):
    write_files("a.jsonl", "b.xlsx")
    with pytest.raises(UserError):
        next(read_rows("a.jsonl b.xlsx"))


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".jsonl.gz"])
def test_a_folder_gives_its_data_files_and_says_what_else_lies_there(kind, folder):
    write_files(*(f"data/{name}{kind}" for name in ("s2", "s10", "s1")))
    about = ("README.md", "README", "LICENSE", ".hidden.jsonl", "_SUCCESS", "dataset_info.json", "dataset_infos.json")
    write_files(*(f"data/{name}" for name in (*about, "notes.docx", "make.py", "more/s3.jsonl")))
    found = find_files("data")
    assert [path.name for path in found.files] == [f"s1{kind}", f"s2{kind}", f"s10{kind}"]
    assert found.ignored == ("make.py", "notes.docx", "more/")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.jsonl", "b.csv"],
            "the folder data has files of several kinds (1 .jsonl, 1 .csv); name those of one: data/*",
        ),
        (["a.jsonl", "config.json"], "has files of several kinds (1 .jsonl, 1 .json)"),
        (
            ["train/a.jsonl", "test/a.jsonl"],
            "the folder data has no data files; it has the folders test, train: name one",
        ),
        (["README.md"], "the folder data has no data files; a name ends in .jsonl"),
        (
            ["train-0.csv", "test-0.csv"],
            "has files of several splits by their names; name those of one: data/train*.csv",
        ),
        (["train.jsonl", "valid.jsonl"], "has files of several splits by their names"),
        (["train_sft-00000-of-00001.csv", "train_gen-00000-of-00001.csv"], "name those of one: data/train_gen*.csv"),
        (["train.jsonl", "more.jsonl"], "has files of several splits by their names"),
        (["requirements.txt", "setup.py"], "has .txt files beside others (setup.py); name those that are to be"),
    ],
)
def test_a_folder_that_can_be_read_in_two_ways_is_refused(names, message, folder):
    write_files(*(f"data/{name}" for name in names))
    assert message in refusal("data")


@pytest.mark.parametrize(
    "names",
    [
        ["train-0.csv", "train-1.csv"],
        ["trains.csv", "tests.csv"],
        ["de.csv", "devil.csv"],
        ["a-00000-of-00002-f1.csv", "a-00001-of-00002-f2.csv"],
    ],
)
def test_names_that_only_begin_like_a_split_are_names(names, folder):
    write_files(*(f"data/{name}" for name in names))
    assert len(texts("data")) == 2


@pytest.mark.parametrize("source", ["owner/chats", "chats", "owner/chats.v2", "HuggingFaceH4/ultrachat_200k"])
def test_an_id_of_the_hub_is_no_file(source, folder):
    assert not is_file(source)


@pytest.mark.parametrize(
    "source",
    ["a.jsonl", "a.csv.gz", "a.xlsx", "./a", "~/a", "/a", "a b", "data/*", "'a b.jsonl'", "x" * 300 + ".jsonl"],
)
def test_what_can_only_be_a_file_is_one_also_where_it_is_missing(source, folder):
    assert is_file(source)


def test_the_rows_of_all_files_have_one_format(folder):
    write_files("a.jsonl", "b.jsonl")
    Path("b.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    reader = RowReader()
    (_, first), (_, second) = read_rows("a.jsonl b.jsonl")
    reader.read(first)
    with pytest.raises(Exception, match="the format is prompt/completion, not text as above it"):
        reader.read(second)


def test_the_report_names_the_number_of_files_and_what_was_not_read(folder, tokenizer, capsys):
    lines = Path(TRAIN).read_text().splitlines()[:40]
    Path("data").mkdir()
    Path("data/a.jsonl").write_text("\n".join(lines[:20]))
    Path("data/b.jsonl").write_text("\n".join(lines[20:]))
    Path("data/notes.docx").write_text("")
    report = load_rows(DataSpec("data"), tokenizer, 128).reports[0]
    said = capsys.readouterr().out
    assert "data: 2 files, 40 rows read (messages), 40 kept, 0 dropped" in said
    assert "  not read, for they are no data files: notes.docx\n" in said
    assert report.kept == 40


def test_every_suffix_has_a_reader():
    assert {*ROW_READERS, *TABLE_READERS} == set(SUFFIXES)
