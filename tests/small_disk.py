"""A file system of a few MiB for a forked process: a disk that is really full."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

NO_MOUNT = 77  # exit status where this system lets nobody mount
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h


def on_small_disk(folder: Path, size: int) -> Callable[[], None]:
    """To be called in a forked process: mounts a tmpfs of `size` bytes on the folder, for this process alone.

    The process ends with NO_MOUNT where it may not mount.
    """

    def mount() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
        try:
            if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
                raise OSError(ctypes.get_errno(), "unshare")
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                Path(f"/proc/self/{name}").write_text(text)
            if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
                raise OSError(ctypes.get_errno(), "mount")
        except (OSError, AttributeError):
            os._exit(NO_MOUNT)

    return mount


def seen_from_outside(process: int, path: Path) -> Path:
    """The path in the mounts of another process."""
    return Path(f"/proc/{process}/root{path}")
