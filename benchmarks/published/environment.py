"""Folders with other versions of transformers and PEFT, to be put in front of the installed ones."""

import fcntl
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from common import REPOSITORY
from common.recipe import UserError

CACHE = REPOSITORY / ".cache" / "published"  # outside git


def environment(packages: Sequence[str]) -> Path:
    """The folder with these packages alone; installs them where it is missing.

    packages: pins, as "transformers==4.48.1". What they depend on is not installed, so torch and all else stay those of
    this environment. Raises UserError when pip fails.
    """
    name = "_".join(pin.replace("==", "-") for pin in packages)
    folder = CACHE / f"{name}-py{sysconfig.get_python_version()}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes make it once
        if not folder.exists():
            _install(packages, folder)
    return folder


def _install(packages: Sequence[str], folder: Path) -> None:
    print(f"installing {', '.join(packages)}, without what they depend on, into {CACHE}", flush=True)
    started = time.perf_counter()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target"]
    with TemporaryDirectory(dir=CACHE) as made:
        unpacked = Path(made) / "packages"
        done = subprocess.run([*pip, str(unpacked), *packages], capture_output=True, text=True)
        if done.returncode:
            problem = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise UserError(f"pip cannot install {', '.join(packages)}: {problem}")
        unpacked.rename(folder)  # all of it at once: a folder that is there is whole
    print(f"installed in {time.perf_counter() - started:.0f} s", flush=True)
