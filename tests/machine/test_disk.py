"""A file or folder is complete or not there, whatever goes wrong while it is written."""

import os
import shutil
from pathlib import Path

import pytest

from common.machine import disk
from common.machine.disk import (
    refuse_target,
    remove_atomically,
    remove_leftovers,
    replace_atomically,
    write_aside,
    write_checked_aside,
    write_text_atomically,
)
from common.recipe import UserError
from tests.machine.test_lock import held_by_another


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_text_replaces_the_old_one(tmp_path):
    for text in ("old", "new ü"):
        write_text_atomically(tmp_path / "run.json", text)
        assert (tmp_path / "run.json").read_text(encoding="utf-8") == text
    assert names(tmp_path) == {"run.json"}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_moved_into_place_can_be_read_by_whom_the_umask_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        with write_aside(tmp_path / "file") as aside:
            aside.touch(0o600)  # as safetensors does
        with write_aside(tmp_path / "folder", folder=True) as aside:
            (aside / "inside").touch(0o600)
            (aside / "link").symlink_to(tmp_path / "private")
            (tmp_path / "private").touch(0o600)
    finally:
        os.umask(before)
    written = [tmp_path / "file", tmp_path / "folder" / "inside"]
    assert [path.stat().st_mode & 0o777 for path in written] == [0o666 & ~umask] * 2
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_text_atomically(tmp_path / "run.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(tmp_path / "run.json", "half of it \ud800")
    assert (tmp_path / "run.json").read_text() == "old"
    assert names(tmp_path) == {"run.json"}


def test_a_folder_replaces_the_old_one(tmp_path):
    make_folder(tmp_path / "rows", "old")
    with write_aside(tmp_path / "rows", folder=True) as aside:
        (aside / "other").write_text("new")
        assert (tmp_path / "rows" / "file").read_text() == "old"
    assert names(tmp_path) == {"rows"} and names(tmp_path / "rows") == {"other"}


def test_a_folder_replaces_a_link_and_not_what_the_link_points_to(tmp_path):
    make_folder(tmp_path / "elsewhere", "theirs")
    (tmp_path / "rows").symlink_to(tmp_path / "elsewhere")
    replace_atomically(make_folder(tmp_path / "new", "ours"), tmp_path / "rows")
    assert not (tmp_path / "rows").is_symlink() and (tmp_path / "rows" / "file").read_text() == "ours"
    assert (tmp_path / "elsewhere" / "file").read_text() == "theirs"


def test_what_was_begun_is_removed_when_it_fails(tmp_path):
    (tmp_path / "merged.writing").mkdir()  # of a killed command
    (tmp_path / ".removing-merged").mkdir()
    with pytest.raises(KeyboardInterrupt):
        with write_checked_aside(tmp_path / "merged", 0, folder=True, overwrite=False) as aside:
            assert os.listdir(aside) == []
            (aside / "half").write_text("")
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_a_folder_is_removed_leaves_no_half_under_its_name(tmp_path, monkeypatch):
    path = make_folder(tmp_path / "rows", "old")
    monkeypatch.setattr(disk.shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_atomically(path)
    monkeypatch.undo()
    assert names(tmp_path) == {".removing-rows"}
    make_folder(path, "new")
    remove_atomically(path)
    remove_atomically(path)
    assert list(tmp_path.iterdir()) == []


def test_a_durable_replacement_syncs_the_content_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def record(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, (tmp_path / "rows").exists()))
        sync(descriptor)

    monkeypatch.setattr(disk.os, "fsync", record)
    replace_atomically(make_folder(tmp_path / "aside", "new"), tmp_path / "rows", durable=True)
    assert synced == [("file", False), ("aside", False), (tmp_path.name, True)]


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    make_folder(tmp_path / "adapter.writing", "half")
    make_folder(tmp_path / ".removing-checkpoint-10", "half")
    (tmp_path / "run.json.writing").write_text("{")
    (tmp_path / "run.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"run.json"}
    remove_leftovers(tmp_path / "no such folder")


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match="would take .* GiB, and .* GiB are free there; make room"):
        with write_checked_aside(tmp_path / "merged", free, folder=True, overwrite=False):
            raise AssertionError("it was begun")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made: "):
        with write_checked_aside(tmp_path / "file" / "merged", 0, folder=True, overwrite=False):
            pass


@pytest.mark.parametrize("folder", [True, False])
def test_two_commands_do_not_write_to_one_place(tmp_path, folder):
    target = tmp_path / "run-gguf" / "run.gguf"
    target.parent.mkdir()
    with held_by_another(target.with_name(".run.gguf.lock")) as other:
        words = f"another command is writing to {target} .process {other.pid} on .*choose another place: TO="
        with pytest.raises(UserError, match=words):
            refuse_target(target, folder=folder, overwrite=True)
        with pytest.raises(UserError, match=words), write_checked_aside(target, 0, folder=folder, overwrite=True):
            pass
    with write_checked_aside(target, 0, folder=folder, overwrite=False) as aside:
        assert target.with_name(".run.gguf.lock").exists()
        (aside / "file" if folder else aside).write_text("new")
    assert names(target.parent) == {"run.gguf"}
