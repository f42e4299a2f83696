"""A lock ends with the process that holds it, and a file that it left behind is none."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.machine.lock import LockHeld, hold_lock, refuse_held
from tests.conftest import ROOT

HOLDER = """
import os, sys, time
from pathlib import Path
from common.machine.lock import hold_lock
with hold_lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    child = os.fork() if sys.argv[2] == "forks" else 1
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(path: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock; its `stdin` is closed at the end, and then it ends too."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(path), how]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.child = int(holder.stdout.readline())  # type: ignore[attr-defined]
        yield holder


def test_a_lock_is_held_by_one_process_which_is_named(tmp_path):
    path = tmp_path / ".lock"
    with held_by_another(path) as holder:
        for shared in (False, True):
            with pytest.raises(LockHeld, match=f"^process {holder.pid} on .+ since 20"), hold_lock(path, shared=shared):
                pass
        with pytest.raises(LockHeld, match=f"^process {holder.pid} on "):
            refuse_held(path)
    assert not path.exists()
    with hold_lock(path):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not path.exists()


@pytest.mark.parametrize("how", ["alone", "forks"])
def test_the_lock_of_a_killed_process_is_free_also_while_a_child_of_it_lives(tmp_path, how):
    path = tmp_path / ".lock"
    with held_by_another(path, how) as holder:
        holder.kill()
        holder.wait()
        try:
            assert path.exists()
            refuse_held(path)
            with hold_lock(path):
                assert path.read_text().startswith(f"process {os.getpid()} on ")
            assert not path.exists()
        finally:
            if how == "forks":
                os.kill(holder.child, signal.SIGKILL)  # it lived all the while


def test_those_who_share_a_lock_keep_out_who_wants_it_alone_until_the_last_one_has_ended(tmp_path):
    path = tmp_path / ".lock"
    with held_by_another(path, "shared"):
        with hold_lock(path, shared=True):
            refuse_held(path)
        assert path.exists()
        with pytest.raises(LockHeld, match="^$"), hold_lock(path):
            pass
    assert not path.exists()


def test_a_file_that_its_holder_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    path, lock = tmp_path / ".lock", fcntl.lockf

    def remove_once(*arguments: int) -> None:
        monkeypatch.setattr(fcntl, "lockf", lock)
        path.unlink()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "lockf", remove_once)
    with hold_lock(path):
        assert path.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_said_and_the_work_goes_on(tmp_path, monkeypatch, capsys, code):
    def fail(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with hold_lock(tmp_path / ".lock"):
        assert list(tmp_path.iterdir()) == []
    refuse_held(tmp_path / ".lock")
    said = capsys.readouterr().out
    assert said.startswith(f"warning: the disk of {tmp_path} has no file locks ({os.strerror(code)}): ")


def test_a_reader_of_a_read_only_folder_needs_no_lock_unless_there_is_one(tmp_path, monkeypatch):
    path, open_file = tmp_path / ".lock", os.open

    def read_only(name: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_CREAT | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return open_file(name, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with hold_lock(path, shared=True):
            assert not path.exists()
        with pytest.raises(OSError, match="Read-only"), hold_lock(path):
            pass
    with held_by_another(path):
        monkeypatch.setattr(os, "open", read_only)
        with pytest.raises(LockHeld, match="^process "), hold_lock(path, shared=True):
            pass
        monkeypatch.undo()


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "letter.txt")
    with pytest.raises(OSError), hold_lock(tmp_path / ".lock"):  # noqa: PT011 - the system's words differ
        pass
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_control_characters_in_a_file_are_not_shown(tmp_path):
    path = tmp_path / ".lock"
    with held_by_another(path) as holder:
        with path.open("w") as file:
            file.write("\x1b[2Jprocess 1")
        with pytest.raises(LockHeld, match="^a process without a name$"):
            refuse_held(path)
        assert holder.poll() is None
