"""What the data files were before they were read: rows of a file that changes meanwhile are of no one version."""

from pathlib import Path
from typing import NamedTuple

from common.data.files import is_file
from common.machine.disk import sha256_of
from common.machine.paths import local_path
from common.recipe import DataSpec, UserError


class FileState(NamedTuple):
    sha256: str
    size: int  # bytes
    version: tuple[int, ...]  # changes with each write and each replacement of the file, also one by equal bytes


FileStates = dict[str, FileState | None]  # by source


def file_states(spec: DataSpec) -> FileStates:
    """The state of the sources and the eval_source, where they are files. None for one that cannot be read."""
    sources = [*(source for source, _ in spec.mixture), spec.eval_source]
    return {source: _file_state(local_path(source)) for source in sources if source is not None and is_file(source)}


def refuse_if_changed(states: FileStates) -> None:
    """Raises UserError when one of the files is no longer in this state."""
    for source, state in states.items():
        if _file_state(local_path(source)) != state:
            raise UserError(f"{source} changed while it was read; start again when nothing writes to it any more")


def _file_state(path: Path) -> FileState | None:
    try:
        if not path.is_file():
            return None
        found = path.stat()
        version = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
        return FileState(sha256_of(path), found.st_size, version)
    except OSError:
        return None  # the reader of the file says why
