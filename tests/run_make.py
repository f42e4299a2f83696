"""Starts make as a user does, also inside `make test`."""

import os
import re
import subprocess
from pathlib import Path

from tests.conftest import ROOT

VARIABLES = frozenset(re.findall(r"^([A-Z_]+) *\?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
OF_MAKE = frozenset({"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MAKEFILES", "GNUMAKEFLAGS"})


def run_make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs make and returns what it printed. An outer make's flags and variables do not reach it.

    make hands those of its command line to everything that it starts: `make test ARGS=-q` would make ARGS=-q a variable
    of every make in the tests.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_MAKE | VARIABLES}
    return subprocess.run(["make", *arguments], capture_output=True, text=True, cwd=cwd, env=environment)
