"""A data file that changes while its rows are read: refused in any format, and nothing of it is kept."""

import json
import os
import shutil
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from common.data import cache
from common.data.rows import load_rows
from common.machine.disk import sha256_of
from common.recipe import DataSpec, UserError
from common.sources.fingerprint import source_state
from tests.conftest import TINY

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".tsv", ".jsonl.gz", ".csv.zst")


def write_rows(path: Path, answer: str) -> None:
    rows = [{"prompt": f"Question {number}", "completion": answer} for number in range(40)]
    kind = path.suffixes[0]
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    mark = "\t" if kind == ".tsv" else ","
    text = {
        ".json": json.dumps(rows),
        ".jsonl": "\n".join(map(json.dumps, rows)),
    }.get(kind) or f"prompt{mark}completion\n" + "".join(f"{row['prompt']}{mark}{answer}\n" for row in rows)
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    path.write_bytes(pyarrow.compress(text.encode(), codec, asbytes=True) if codec else text.encode())


def write_anew(path: Path) -> None:
    write_rows(path, "no!")


def write_anew_with_the_old_time(path: Path) -> None:
    before = path.stat()
    write_rows(path, "no!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def replace_by_equal_bytes(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def put_another_in_its_place_and_back(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    write_rows(path, "no!")
    path.with_suffix(".old").replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CHANGES = (
    write_anew, write_anew_with_the_old_time, append, replace_by_equal_bytes, put_another_in_its_place_and_back, cut,
    Path.unlink,
)  # fmt: skip


@pytest.fixture(scope="module")
def own_tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def while_it_is_read(own_tokenizer, tmp_path, monkeypatch):
    """while_it_is_read(change): loads rows with a tokenizer that calls `change` when it renders the first row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "MIN_SOURCE_BYTES", 1)
    render, waiting = own_tokenizer.apply_chat_template, []

    def apply_chat_template(*args, **kwargs):
        while waiting:
            time.sleep(0.02)  # a file system's clock has steps of up to 10 ms
            waiting.pop()()
        return render(*args, **kwargs)

    monkeypatch.setattr(own_tokenizer, "apply_chat_template", apply_chat_template)

    def load(spec, change=None):
        waiting.extend([change] if change else [])
        return load_rows(spec, own_tokenizer, 64)

    return load


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_changes_while_it_is_read_is_refused(suffix, change, while_it_is_read, tmp_path):
    path = tmp_path / f"chats{suffix}"
    write_rows(path, "yes")
    with pytest.raises(UserError, match=rf"chats{suffix} changed while it was read; start again"):
        while_it_is_read(DataSpec(str(path)), lambda: change(path))
    assert not Path(".cache").exists()


@pytest.mark.parametrize("changed", ["chats.csv", "held_out.jsonl"])
def test_both_files_are_watched_until_both_are_read(changed, while_it_is_read, tmp_path):
    for name in ("chats.csv", "held_out.jsonl"):
        write_rows(tmp_path / name, "yes")
    spec = DataSpec("chats.csv", eval_source="held_out.jsonl")
    with pytest.raises(UserError, match=f"{changed} changed while it was read"):
        while_it_is_read(spec, lambda: append(tmp_path / changed))


def test_what_a_refused_start_read_is_not_taken_for_the_file_that_was_put_back(while_it_is_read, tmp_path, capsys):
    path, spec = tmp_path / "chats.jsonl", DataSpec(str(tmp_path / "chats.jsonl"))
    write_rows(path, "yes")
    with pytest.raises(UserError):
        while_it_is_read(spec, lambda: write_anew(path))
    write_rows(path, "yes")
    capsys.readouterr()
    while_it_is_read(spec)
    out = capsys.readouterr().out
    assert "taken from" not in out and "⟦yes" in out


def test_to_read_a_file_is_no_change_of_it(while_it_is_read, tmp_path, capsys):
    write_rows(tmp_path / "chats.csv", "yes")
    while_it_is_read(DataSpec("chats.csv"), (tmp_path / "chats.csv").read_bytes)
    while_it_is_read(DataSpec("chats.csv"))
    assert "taken from .cache" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["shards", "shards/*.jsonl", "shards/1.jsonl shards/2.jsonl"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_file_of_a_source_is_watched(change, source, while_it_is_read, tmp_path):
    (tmp_path / "shards").mkdir()
    for number in (1, 2):
        write_rows(tmp_path / "shards" / f"{number}.jsonl", "yes")
    with pytest.raises(UserError, match="shards.* changed while it was read; start again"):
        while_it_is_read(DataSpec(source), lambda: change(tmp_path / "shards" / "2.jsonl"))


def test_a_file_that_comes_while_its_folder_is_read_is_a_change(while_it_is_read, tmp_path):
    (tmp_path / "shards").mkdir()
    write_rows(tmp_path / "shards" / "1.jsonl", "yes")
    with pytest.raises(UserError, match="shards changed while it was read"):
        while_it_is_read(DataSpec("shards"), lambda: write_rows(tmp_path / "shards" / "2.jsonl", "yes"))


def test_a_saved_data_set_is_watched(while_it_is_read, tmp_path):
    datasets.Dataset.from_list([{"prompt": "a", "completion": "yes"}] * 40).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="saved changed while it was read"):
        while_it_is_read(DataSpec("saved"), lambda: append(tmp_path / "saved" / "state.json"))


def test_the_sha256_of_one_file_is_the_files_own_and_of_several_that_of_all_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, answer in (("a.jsonl", "yes"), ("b.jsonl", "no"), ("c.jsonl", "no")):
        write_rows(tmp_path / name, answer)
    assert source_state("a.jsonl").sha256 == sha256_of(tmp_path / "a.jsonl")
    both = source_state("a.jsonl b.jsonl")
    assert both.size == (tmp_path / "a.jsonl").stat().st_size + (tmp_path / "b.jsonl").stat().st_size
    assert both.sha256 == source_state("a.jsonl c.jsonl").sha256
    sources = ("a.jsonl", "b.jsonl", "a.jsonl b.jsonl", "b.jsonl a.jsonl", "*.jsonl")
    assert len({source_state(source).sha256 for source in sources}) == len(sources)
    assert source_state("a.jsonl none.jsonl") is None
