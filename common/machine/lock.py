"""Locks that the kernel keeps for a process: they end with it, however it ends.

They are POSIX record locks (fcntl.lockf). Unlike those of flock, a forked child does not inherit them, so that no data
worker keeps the lock of a run that was killed, and on NFS they hold between machines. They belong to the process:
closing any descriptor of the file drops them. So only this module opens a lock file, and a process takes a lock once.

A lock file says who holds the lock, and is removed with it. One that a killed process left is no lock.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a link, or a pipe, in the place of the file is not opened
_MAX_HOLDER_BYTES = 200


class LockHeld(Exception):
    """Other processes hold the lock. The message names the one that holds it alone; it is empty where they share it."""


@contextlib.contextmanager
def hold_lock(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of the file `path`, which is made where it is missing: alone, or together with others that share.

    Raises LockHeld at once when that cannot be. On a disk without file locks a warning says so, and nothing is held;
    nor is it where `shared` and the file can be neither made nor read. Raises OSError when a lock to be held alone has
    no file.
    """
    descriptor = _acquire(path, shared=shared)
    try:
        yield
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def refuse_held(path: Path) -> None:
    """Raises LockHeld when another process holds the lock alone. Writes nothing."""
    with contextlib.suppress(OSError):  # no such file, or no locks on this disk
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        try:
            if not _try_lock(descriptor, fcntl.LOCK_SH):
                raise LockHeld(_read_holder(descriptor))
        finally:
            os.close(descriptor)


def _acquire(path: Path, *, shared: bool) -> int | None:
    """The descriptor of the locked file; None where no lock can be held."""
    while (descriptor := _open(path, shared=shared)) is not None:
        try:
            if not _try_lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                is_shared = not shared and _try_lock(descriptor, fcntl.LOCK_SH)
                raise LockHeld("" if is_shared else _read_holder(descriptor))
            if _is_at(path, descriptor):  # otherwise its last holder has just removed it
                if not shared:
                    _write_holder(descriptor)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            print(
                f"warning: the disk of {path.parent} has no file locks ({error.strerror}): nothing keeps a second "
                "run or command out"
            )
            return None
        except LockHeld:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return None


def _open(path: Path, *, shared: bool) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
    except OSError:
        if not shared:
            raise
    try:
        return os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        return None


def _try_lock(descriptor: int, operation: int) -> bool:
    """Returns whether this process has the lock. Raises OSError on a disk without locks."""
    try:
        fcntl.lockf(descriptor, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(path: Path, descriptor: int) -> None:
    """Ends the lock, and removes the file unless others share the lock or the file is read-only."""
    with contextlib.suppress(OSError):
        if _try_lock(descriptor, fcntl.LOCK_EX) and _is_at(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _write_holder(descriptor: int) -> None:
    text = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}"
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _read_holder(descriptor: int) -> str:
    text = os.pread(descriptor, _MAX_HOLDER_BYTES, 0).decode(errors="replace")
    return text if text and text.isprintable() else "a process without a name"
