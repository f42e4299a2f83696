"""What the readers of text files share: what they refuse by its first bytes, and the command that converts it."""

import codecs
from pathlib import Path

from common.recipe import UserError
from common.sources.unpacking import CODECS, command_on, open_data, unpacked_suffix

_TAR_AT = 257  # where a tar archive has the word ustar (POSIX pax, ustar header block)
# First bytes of files that are no text, whatever they are named
_FOREIGN = {
    b"PK\x03\x04": "is a zip archive, as .xlsx and .docx are: save a table as CSV, a document as .txt, or unpack it",
    b"\xd0\xcf\x11\xe0": "is a file of an older Excel or Word: save a table as CSV, a document as .txt",
    b"%PDF": "is a PDF; save its text as .txt in UTF-8",
    b"{\\rtf": "is a document in RTF; save its text as .txt in UTF-8",
    b"BZh": "is packed in a way that is not read; unpack it first, or pack it with gzip or zstd",
    b"\xfd7zXZ": "is packed in a way that is not read; unpack it first, or pack it with gzip or zstd",
    b"7z\xbc\xaf": "is an archive; unpack it, and name the files that were in it",
    b"Rar!": "is an archive; unpack it, and name the files that were in it",
    b"PAR1": "is a Parquet file by its first bytes; name it .parquet",
    b"ARROW1": "is an Arrow file by its first bytes; name it .arrow",
    b"SQLite format": "is a database; write its rows as .csv or .jsonl",
}


def check_start(path: Path) -> None:
    """Raises UserError when a file, unpacked, begins as no text in UTF-8 does, and says what to do."""
    with open_data(path) as file:
        start = file.read(_TAR_AT + 5)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16; convert it: {convert_command(path, 'UTF-16')}")
    if start.startswith(tuple(CODECS)):
        raise UserError(f"{path} is compressed twice; unpack it once: {command_on(path, '', f'once{path.suffix}')}")
    if start[_TAR_AT:] == b"ustar":
        raise UserError(f"{path} is an archive of tar; unpack it, and name the files that were in it")
    for magic, remedy in _FOREIGN.items():
        if start.startswith(magic):
            raise UserError(f"{path} {remedy}")


def convert_command(path: Path, encoding: str = "WINDOWS-1252") -> str:
    """The command that writes the file as UTF-8. Text that is not UTF-8 is most often WINDOWS-1252, as Excel saves."""
    return command_on(path, f"iconv -f {encoding} -t UTF-8", f"utf8{unpacked_suffix(path)}")


def is_utf8(text: str) -> bool:
    """Returns whether the text has no lone surrogate, which stands for a byte or half a character that is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
