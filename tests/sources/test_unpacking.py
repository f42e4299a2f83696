"""Compressed files: the same rows as unpacked ones, whatever the name, and never whole in memory."""

import bz2
import gzip
import subprocess
import sys

import pyarrow
import pytest

from common.recipe import UserError
from common.sources.files import read_rows
from tests.conftest import ROOT
from tests.data.test_bad_data import zstd
from tests.sources.test_files import write

ROWS = [{"prompt": "ä?", "completion": "b\nc"}, {"prompt": "d", "completion": "e"}]
CONTENTS = {
    ".jsonl": '{"prompt": "ä?", "completion": "b\\nc"}\n{"prompt": "d", "completion": "e"}\n',
    ".json": '[{"prompt": "ä?", "completion": "b\\nc"},\n{"prompt": "d", "completion": "e"}]',
    ".csv": '\ufeffprompt;completion\r\nä?;"b\nc"\r\nd;e\r\n',
    ".tsv": 'prompt\tcompletion\nä?\t"b\nc"\nd\te\n',
}


@pytest.mark.parametrize("name", ["a{}.{}", "a{}", "A{}.{}"], ids=["by its name", "only by its content", "in capitals"])
@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_compressed_file_gives_the_rows_of_the_unpacked_one(kind, suffix, pack, name, tmp_path):
    named = name.format(kind, suffix)
    source = write(tmp_path, named.upper() if named[0] == "A" else named, pack(CONTENTS[kind].encode()))
    assert [row for _, row in read_rows(source)] == ROWS


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_name_may_say_that_a_plain_file_is_compressed(kind, tmp_path):
    assert [row for _, row in read_rows(write(tmp_path, f"a{kind}.gz", CONTENTS[kind]))] == ROWS


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_several_compressed_streams_in_a_file_are_all_read(pack, tmp_path):
    first, second = CONTENTS[".jsonl"].splitlines(keepends=True)
    source = write(tmp_path, "a.jsonl.gz", pack(first.encode()) + pack(b"") + pack(second.encode()))
    assert [place for place, _ in read_rows(source)] == [f"{source}:1", f"{source}:2"]
    assert [row for _, row in read_rows(source)] == ROWS


def test_the_damaged_one_of_several_is_named(tmp_path):
    good = write(tmp_path, "a.jsonl.gz", gzip.compress(CONTENTS[".jsonl"].encode()))
    bad = write(tmp_path, "b.jsonl.gz", gzip.compress(CONTENTS[".jsonl"].encode())[:-4])
    with pytest.raises(UserError, match=r"/b\.jsonl\.gz is damaged \(Truncated"):
        list(read_rows(f"{good} {bad}"))


def test_other_packing_is_refused_where_only_the_content_says_so(tmp_path):
    with pytest.raises(UserError, match="is packed in a way that is not read"):
        list(read_rows(write(tmp_path, "a.jsonl", bz2.compress(b'{"text": "a"}'))))


READ = """
import sys
from common.sources.files import read_rows
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss is the parent's too
list(read_rows(sys.argv[2])); before = peak()
print(sum(1 for _ in read_rows(sys.argv[1])), peak() - before)
"""


def write_large(path, kind: str) -> None:
    """A file of 60,000 rows, about 60 MB unpacked."""
    text = "word " * 200
    if kind == "arrow":
        table = pyarrow.table({"text": [text] * 10_000})
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            for _ in range(6):
                writer.write_table(table)
        return
    lines = (
        [f'{{"text": "{text}"}}\n'.encode()] * 60_000
        if kind == "jsonl"
        else [b"text\n", *[text.encode() + b"\n"] * 60_000]
    )
    with pyarrow.CompressedOutputStream(str(path), "gzip" if path.suffix == ".gz" else "zstd") as file:
        file.write(b"".join(lines))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.zst", "a.arrow"])
def test_a_large_file_is_never_in_memory_whole(name, tmp_path):
    write_large(tmp_path / name, name.split(".")[1])
    first = tmp_path / ("first.csv.gz" if ".csv" in name else "first.jsonl.gz")  # what unpacking imports is there then
    first.write_bytes(gzip.compress(b"text\na\n" if ".csv" in name else b'{"text": "a"}'))
    command = [sys.executable, "-c", READ, str(tmp_path / name), str(first)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows, kib = map(int, done.stdout.split())
    assert rows == 60_000
    if name != "a.arrow":  # whose pages are the file's, mapped: the system takes them back
        assert kib < 30 << 10
