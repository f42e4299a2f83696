"""Opens data files, and unpacks those that are compressed while they are read: never into memory or onto the disk."""

import io
import shlex
from pathlib import Path
from typing import BinaryIO

from common.sources.source_files import COMPRESSED_SUFFIXES

# The first bytes of a compressed file, whatever its name (RFC 1952 section 2.3.1, RFC 8878 section 3.1.1), and the
# program that unpacks it
CODECS = {b"\x1f\x8b": ("gzip", "gunzip -c"), b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc")}
BLOCK_BYTES = 1 << 20


def open_data(path: Path) -> BinaryIO:
    """Opens a file to read its bytes, unpacked where they are compressed. Damage raises OSError where it is read."""
    file = path.open("rb")
    if (codec := _codec(file.peek(4))) is None:
        return file
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, codec[0]), BLOCK_BYTES)  # which close each other


def is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return _codec(file.peek(4)) is not None


def command_on(path: Path, program: str, target: str) -> str:
    """A line for the shell that puts a file, unpacked, through a program, and the result into the file `target`.

    program: "" for a compressed file that is only to be unpacked.
    """
    with path.open("rb") as file:
        codec = _codec(file.peek(4))
    name = shlex.quote(str(path))
    if codec is None:
        return f"{program} {name} > {target}"
    return f"{codec[1]} < {name} {program and f'| {program} '}> {target}"


def unpacked_suffix(path: Path) -> str:
    """The suffix of a file's name without that of its compression."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path).suffix


def _codec(start: bytes) -> tuple[str, str] | None:
    return next((codec for magic, codec in CODECS.items() if start.startswith(magic)), None)
