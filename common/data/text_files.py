"""What the readers of text files share: which encodings they refuse, and the command that converts them."""

import codecs
import shlex
from pathlib import Path

from common.recipe import UserError


def check_encoding(path: Path) -> None:
    """Raises UserError when the first bytes are those of UTF-16, UTF-32 or gzip."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16; convert it: {convert_command(path, 'UTF-16')}")
    if start.startswith(b"\x1f\x8b"):
        command = f"gunzip < {shlex.quote(str(path))} > unpacked{path.suffix}"  # which refuses a name without .gz
        raise UserError(f"{path} is gzip-compressed; unpack it first: {command}")


def convert_command(path: Path, encoding: str = "WINDOWS-1252") -> str:
    """The command that writes the file as UTF-8. Text that is not UTF-8 is most often WINDOWS-1252, as Excel saves."""
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}"


def is_utf8(text: str) -> bool:
    """Returns whether the text has no lone surrogate, which stands for a byte or half a character that is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
