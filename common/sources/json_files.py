"""Reads rows from JSON: one object a line, or one list of objects, whatever of the two the file's name says."""

import codecs
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.recipe import UserError
from common.sources.source_row import MAX_ROW_BYTES, BadRow, PlacedRow, Row, Unreadable, readable
from common.sources.text_files import check_start, convert_command
from common.sources.unpacking import command_on, open_data

MAX_LIST_BYTES = 256 << 20  # a list is read into memory whole
NAN = Unreadable("NaN and Infinity are not JSON; write null")
KEY_TWICE = Unreadable("a key occurs twice in a JSON object")  # it is unclear which value counts
_OPENS_LIST = re.compile(rb"\s*\[\s*(\{|$)")


def jsonl_rows(path: Path) -> Iterator[PlacedRow]:
    """Yields the rows of a .jsonl file. A file that is one list of objects is read as .json."""
    check_start(path)
    first, second = _first_two_lines(path)
    if first.strip() == b"{" and second.lstrip().startswith(b'"'):
        raise UserError(
            f"{path} is pretty-printed: its objects span several lines. Write one object a line: "
            f"{command_on(path, 'jq -c .', 'lines.jsonl')}"
        )
    is_list = _OPENS_LIST.match(first) and not (second and _is_json(first))
    yield from _list_rows(path) if is_list else _line_rows(path)


def json_rows(path: Path) -> Iterator[PlacedRow]:
    """Yields the rows of a .json file. A file with one object a line is read as .jsonl."""
    check_start(path)
    first, second = _first_two_lines(path)
    is_lines = first.lstrip().startswith(b"{") and second and _is_json(first)
    yield from _line_rows(path) if is_lines else _list_rows(path)


def parse_json(text: str) -> Any:
    """Returns the value. Raises BadRow when the text is not JSON, or holds a NaN, an Infinity or a key twice."""
    return readable(_parse(text))


def _parse(text: str) -> Any:
    """Returns the value, with an Unreadable in the place of each NaN and Infinity, and of each key that occurs twice.

    Raises BadRow when the text is not JSON.
    """
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("invalid JSON") from error


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        row |= {key: KEY_TWICE for key, count in counts.items() if count > 1}
    return row


_DECODER = json.JSONDecoder(parse_constant=lambda name: NAN, object_pairs_hook=_object_of_pairs)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _first_two_lines(path: Path) -> tuple[bytes, bytes]:
    """The first two lines that are not blank, at most MAX_ROW_BYTES of each; empty where there are fewer."""
    found: list[bytes] = []
    with open_data(path) as file:
        while len(found) < 2 and (line := file.readline(MAX_ROW_BYTES)):
            line = line.removeprefix(codecs.BOM_UTF8)
            found += [line] if line.strip() else []
    return (*found, b"", b"")[0], (*found, b"", b"")[1]


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields the file's lines, and None for a line that is too long, which is never in memory whole."""
    while line := file.readline(MAX_ROW_BYTES):
        too_long = len(line) == MAX_ROW_BYTES
        while len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES)
        yield None if too_long else line


def _line_rows(path: Path) -> Iterator[PlacedRow]:
    with open_data(path) as file:
        for number, line in enumerate(_lines(file), 1):
            place = f"{path}:{number}"
            try:
                if line is None:
                    raise BadRow(f"a line of more than {MAX_ROW_BYTES >> 20} MiB")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                yield place, _as_row(_parse(text))
            except UnicodeDecodeError:
                yield place, BadRow("not UTF-8; convert the file: iconv -f WINDOWS-1252 -t UTF-8")
            except BadRow as fault:
                yield place, fault


def _as_row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise BadRow("a list, not a JSON object" if isinstance(value, list) else "not a JSON object")
    return value


def _list_rows(path: Path) -> Iterator[PlacedRow]:
    with open_data(path) as file:
        content = file.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        as_lines = command_on(path, "jq -c '.[]'", "lines.jsonl")
        raise UserError(
            f"{path} is one list of more than {MAX_LIST_BYTES >> 20} MiB, too large to be read whole. Write one object "
            f"a line: {as_lines}"
        )
    try:
        entries = _DECODER.decode(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it: {convert_command(path)}") from error
    except json.JSONDecodeError as error:
        hint = "; write one list of objects, or one object a line" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: invalid JSON: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(entries, list):
        raise UserError(
            f"{path} holds one {_name(entries)}; a .json file is a list of objects{_taking_list(path, entries)}"
        )
    for number, entry in enumerate(entries, 1):
        try:
            yield f"{path}, entry {number}", _as_row(entry)
        except BadRow as fault:
            yield f"{path}, entry {number}", fault


def _name(value: Any) -> str:
    return "object" if isinstance(value, dict) else "text" if isinstance(value, str) else type(value).__name__


def _taking_list(path: Path, value: Any) -> str:
    """The command that takes the rows out of a file that is one object, where they are a list in it."""
    lists = {key: part for key, part in value.items() if isinstance(part, list)} if isinstance(value, dict) else {}
    key = next((key for key, part in lists.items() if part and isinstance(part[0], dict)), None)
    if key is None:
        return ""
    program = f"jq {shlex.quote(f'.[{json.dumps(key)}]')}"
    return f", which it has under {key!r:.40}: {command_on(path, program, 'list.json')}"
