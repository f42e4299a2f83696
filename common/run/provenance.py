"""Where a run came from: the command that started it, and the state of the code."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import REPOSITORY

MAKE_TARGETS = ("finetune", "dryrun")  # those that run a recipe
# The Makefile's variables for these flags.
MAKE_VARIABLES = {"--data": "DATA", "--gpu": "GPU", "--out": "OUT", "--set": "SET"}


def command_line(arguments: list[str] | None = None) -> str:
    """The command that repeats this run, for a shell: through make where it was started so, else as it was typed.

    arguments: those of the process; None takes sys.argv.
    """
    program, *flags = arguments or sys.argv
    if Path(program).stem.endswith("kernel_launcher"):  # ipykernel's, and Colab's
        return "main(recipe), in a notebook"
    if Path(program).parts[-2:] != ("recipes", "__main__.py") or not flags:
        return shlex.join(["python", program, *flags])
    target = flags.pop(0) if flags[0] in MAKE_TARGETS and len(flags) > 1 else "finetune"
    name, *flags = flags
    variables, rest = {"MODEL": name, "GPUS": os.environ.get("WORLD_SIZE", "1").removeprefix("1")}, []
    while flags:
        flag, is_word, value = flags.pop(0).partition("=")
        if flag in MAKE_VARIABLES and (is_word or flags):
            variables[MAKE_VARIABLES[flag]] = value if is_word else flags.pop(0)
        elif flag not in ("--resume", "--overwrite"):  # whoever repeats the run begins anew
            rest.append(flag + is_word + value)
    return make_command(target, variables, rest)


def make_command(target: str, variables: Mapping[str, str | None], arguments: Sequence[str]) -> str:
    """A line for the shell. Variables without a value are left out; the arguments become ARGS."""
    words = [f"{name}={value}" for name, value in variables.items() if value]
    return shlex.join(["make", target, *words, *([f"ARGS={shlex.join(arguments)}"] if arguments else [])])


def code_version() -> dict[str, str]:
    """The commit of these recipes, with "-dirty" where files were changed since; empty outside a git checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"recipes": answer.stdout.strip()}
