"""Where a run came from: the command that started it, and the state of the code."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from common import REPOSITORY

VARIABLES = {"--data": "DATA", "--out": "OUT"}  # flags that the Makefile has variables for


def command_line(arguments: list[str] | None = None) -> str:
    """The command that runs it again: as make has it, or as it was typed. arguments: sys.argv."""
    program, *flags = arguments or sys.argv
    if Path(program).parts[-2:] != ("recipes", "__main__.py") or not flags:
        return shlex.join(["python", program, *flags])
    name, *flags = flags
    processes = os.environ.get("WORLD_SIZE", "1")  # set by torchrun
    command, rest = [f"MODEL={name}", *([f"GPUS={processes}"] if processes != "1" else [])], []
    while flags:
        flag = flags.pop(0)
        if flag in VARIABLES and flags:
            command.append(f"{VARIABLES[flag]}={flags.pop(0)}")
        elif flag not in ("--resume", "--overwrite"):  # the same run, from its beginning
            rest.append(flag)
    return shlex.join(["make", "finetune", *command, *([f"ARGS={shlex.join(rest)}"] if rest else [])])


def code_version() -> dict[str, str]:
    """The commit of these recipes, and whether files were changed since; nothing outside a git checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"recipes": answer.stdout.strip()}
