"""Paths as people type them: with ~ for the home folder, a slash at the end, or one of several ways to a place.

A recipe keeps what was typed, and so do run.json and the adapter's config, which travel: no home folder is named there.
Whoever opens a place calls local_path; what a command writes goes to output_path.
"""

import os
from pathlib import Path


def local_path(typed: str) -> Path:
    """The path, with the home folder in the place of ~. The name of a hub's model or data set stays what it is."""
    return Path(os.path.expanduser(typed))


def output_path(typed: str) -> Path:
    """local_path of a place to write to. It ends in a name, also for "." and "..": other places are named after it."""
    path = local_path(typed)
    return path.resolve() if path.name in ("", "..") else path


def is_same_place(first: str, second: str) -> bool:
    """Whether two names are one: the same text, or paths to one file or folder, which exists."""
    if first == second:
        return True
    try:
        return os.path.samefile(local_path(first), local_path(second))
    except (OSError, ValueError):  # ValueError: a NUL byte
        return False


def hide_home(path: str) -> str:
    """The path with ~ in the place of this user's home folder."""
    home = os.path.expanduser("~").rstrip("/")
    return f"~{path.removeprefix(home)}" if home.startswith("/") and f"{path}/".startswith(f"{home}/") else path
