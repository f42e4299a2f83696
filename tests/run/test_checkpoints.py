"""A checkpoint is whole or not there, and one that was altered since is found."""

import json
import shutil

import pytest

from common.machine import disk
from common.machine.disk import remove_atomically, remove_leftovers
from common.run import checkpoints
from common.run.checkpoints import (
    MANIFEST,
    commit_checkpoint,
    find_damage,
    go_back_to,
    keep_newest,
    newest_intact,
    read_run_identity,
    staging_folder,
    write_checkpoint,
)

FILES = {"adapter_model.safetensors": b"weights" * 100, "optimizer.pt": b"moments" * 100, "trainer_state.json": b"{}"}


def write(folder, step=10, run=None):
    written = staging_folder(folder)
    written.mkdir(parents=True)
    for name, content in FILES.items():
        (written / name).write_bytes(content)
    target = folder / f"checkpoint-{step}"
    commit_checkpoint(written, target, run or {"rows": "abc"})
    return target


def test_a_sealed_checkpoint_is_intact_and_knows_its_run(tmp_path):
    checkpoint = write(tmp_path, run={"rows": "hash"})
    assert find_damage(checkpoint) is None
    assert read_run_identity(checkpoint) == {"rows": "hash"}
    assert newest_intact(tmp_path) == checkpoint
    assert not staging_folder(tmp_path).exists()


ALTERATIONS = {
    "a byte is flipped": (
        lambda c: (c / "optimizer.pt").write_bytes(b"momentz" + FILES["optimizer.pt"][7:]),
        "optimizer.pt is not what was written",
    ),
    "a bit of the weights is flipped": (
        lambda c: (c / "adapter_model.safetensors").write_bytes(FILES["adapter_model.safetensors"][:-1] + b"r"),
        "adapter_model.safetensors is not what was written",
    ),
    "cut short": (
        lambda c: (c / "optimizer.pt").write_bytes(FILES["optimizer.pt"][:333]),
        "optimizer.pt has 333 bytes instead of 700",
    ),
    "emptied": (lambda c: (c / "optimizer.pt").write_bytes(b""), "optimizer.pt has 0 bytes instead of 700"),
    "longer": (
        lambda c: (c / "optimizer.pt").write_bytes(FILES["optimizer.pt"] + b"!"),
        "optimizer.pt has 701 bytes instead of 700",
    ),
    "weights are missing": (
        lambda c: (c / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors is missing",
    ),
    "states are missing": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "a foreign file": (
        lambda c: (c / "pytorch_model.bin").write_bytes(b"pickle"),
        "pytorch_model.bin does not belong to it",
    ),
    "a link for a file": (
        lambda c: ((c / "optimizer.pt").unlink(), (c / "optimizer.pt").symlink_to("/etc/hostname")),
        "optimizer.pt is no plain file",
    ),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), f"it has no {MANIFEST}"),
    "half a manifest": (
        lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:100]),
        f"{MANIFEST} is damaged",
    ),
    "a manifest of something else": (lambda c: (c / MANIFEST).write_text(json.dumps([1, 2])), f"{MANIFEST} is damaged"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_pitfall_29_an_altered_checkpoint_is_named_and_skipped(tmp_path, alteration, capsys):
    older, newest = write(tmp_path, 10), write(tmp_path, 20)
    alter, words = ALTERATIONS[alteration]
    alter(newest)
    assert newest_intact(tmp_path) == older
    assert capsys.readouterr().out == f"{newest} is damaged ({words}): skipped\n"


def test_every_truncation_and_every_flipped_byte_is_found(tmp_path):
    checkpoint = write(tmp_path)
    for name, content in FILES.items():
        for at in range(0, len(content), 37):
            (checkpoint / name).write_bytes(content[:at])
            assert find_damage(checkpoint)
            (checkpoint / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert find_damage(checkpoint)
        (checkpoint / name).write_bytes(content)
    assert find_damage(checkpoint) is None


def test_the_newest_is_that_of_the_highest_step(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert newest_intact(tmp_path).name == "checkpoint-100"


def test_where_none_is_intact_there_is_none(tmp_path):
    assert newest_intact(tmp_path) is None
    shutil.rmtree(write(tmp_path) / "optimizer.pt", ignore_errors=True)
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert newest_intact(tmp_path) is None


def test_pitfall_36_only_the_last_two_stay(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
        keep_newest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_a_run_that_goes_back_leaves_no_damaged_checkpoint_to_be_counted(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    newest = newest_intact(tmp_path)
    go_back_to(newest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_takes_the_place_of_a_damaged_one_of_its_step(tmp_path):
    (write(tmp_path) / "optimizer.pt").unlink()
    assert find_damage(write(tmp_path)) is None


def test_what_a_kill_left_half_written_or_half_removed_is_cleaned_up(tmp_path, monkeypatch):
    whole = write(tmp_path, 10)
    monkeypatch.setattr(checkpoints, "sha256_of", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 20)
    monkeypatch.undo()
    monkeypatch.setattr(disk.shutil, "rmtree", lambda path, **_: path.exists() and _raise())
    with pytest.raises(KeyboardInterrupt):
        remove_atomically(whole)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {".writing", ".removing-checkpoint-10"}
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _raise():
    raise KeyboardInterrupt


def test_what_a_process_cannot_write_is_a_warning_and_the_checkpoint_before_stays(tmp_path, capsys):
    older = write(tmp_path, 10)

    def half() -> None:
        folder = staging_folder(tmp_path) / "checkpoint-20"
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(b"mom")
        raise OSError(28, "No space left on device")

    write_checkpoint(tmp_path, 20, half, {})
    assert capsys.readouterr().out == (
        "warning: checkpoint-20 cannot be written (No space left on device); training goes on, "
        "the last checkpoint is checkpoint-10\n"
    )
    assert list(tmp_path.iterdir()) == [older]


def test_a_written_checkpoint_is_committed_with_its_run(tmp_path, capsys):
    def files() -> None:
        folder = staging_folder(tmp_path) / "checkpoint-20"
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(b"moments")

    for step in (5, 10):
        write(tmp_path, step)
    write_checkpoint(tmp_path, 20, files, {"rows": "hash"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20"]
    assert newest_intact(tmp_path) == tmp_path / "checkpoint-20"
    assert read_run_identity(tmp_path / "checkpoint-20") == {"rows": "hash"}
    assert capsys.readouterr().out == ""
