"""What the data files were before they were read: rows of a file that changes meanwhile are of no one version."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from common.machine.disk import sha256_of
from common.recipe import DataSpec, UserError
from common.sources.source_files import find_files, is_file


class SourceState(NamedTuple):
    """Of all files of a source."""

    sha256: str  # of a single file its own; of several that of their sha256s, in the order that they are read in
    size: int  # bytes
    versions: tuple[tuple[int, ...], ...]  # a file's changes with each write, and with its replacement by equal bytes


FileStates = dict[str, SourceState | None]  # by source


def file_states(spec: DataSpec) -> FileStates:
    """The state of the sources and the eval_source, where they are files. None for one that cannot be read."""
    sources = [*(source for source, _ in spec.mixture), spec.eval_source]
    return {source: source_state(source) for source in sources if source is not None and is_file(source)}


def refuse_shared_files(spec: DataSpec) -> None:
    """Raises UserError where two sources of a mixture have a file in common, whose rows would be taken twice.

    Raises it too where a file of any source is missing, before the first one is read.
    """
    source_of: dict[Path, str] = {}
    for source, _ in spec.mixture:
        for file in find_files(source).files if is_file(source) else ():
            other = source_of.setdefault(file.resolve(), source)
            if other != source:
                raise UserError(f"{file.resolve()} is in two of DataSpec.sources, {other!r} and {source!r}; leave one")
    if spec.eval_source is not None and is_file(spec.eval_source):
        find_files(spec.eval_source)


def refuse_if_changed(states: FileStates) -> None:
    """Raises UserError when the files of a source are no longer in this state, or no longer the same ones."""
    for source, state in states.items():
        if source_state(source) != state:
            raise UserError(f"{source} changed while it was read; start again when nothing writes to it any more")


def source_state(source: str) -> SourceState | None:
    """None where the files cannot be read: their reader says why."""
    hashes, size, versions = [], 0, []
    try:
        for path in find_files(source).files:
            if not path.is_file():
                return None
            found = path.stat()
            versions.append((found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns))
            hashes.append(sha256_of(path))
            size += found.st_size
    except (OSError, UserError):
        return None
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    return SourceState(sha256, size, tuple(versions))
