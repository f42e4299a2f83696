"""Reads rows from CSV and TSV files, as Excel writes them too: with commas, semicolons or tabs, or a line sep=;."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from common.process_state import allow_large_csv_cells
from common.recipe import Kind, UserError
from common.sources.formats import WANTED_KEYS, match_keys, quoted
from common.sources.source_row import MAX_ROW_BYTES, BadRow, PlacedRow
from common.sources.text_files import check_start, convert_command, is_utf8
from common.sources.unpacking import open_data, unpacked_suffix

DELIMITERS = (",", ";", "\t")
TSV_DELIMITERS = ("\t",)
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[,;\t]*[\r\n]*')  # Excel's own first line


class Header(NamedTuple):
    delimiter: str
    names: tuple[str, ...]
    places: dict[str, int]  # from a key of the format to its column


def csv_rows(
    path: Path, unread: Counter[str], columns: dict[str, str] | None = None, kind: Kind | None = "conversations"
) -> Iterator[PlacedRow]:
    """Yields the rows of a CSV file, with the columns that its format reads. Rows of empty cells are skipped.

    Adds to `unread` how many rows have a text in each of the other columns.
    """
    check_start(path)
    allow_large_csv_cells(MAX_ROW_BYTES)
    header = _find_header(path, columns, kind)
    if header is None:
        return
    records = _records(path, header.delimiter)
    next(records)  # the header
    others = _other_columns(header)
    for line, cells in records:
        if len(cells) != len(header.names):
            yield f"{path}:{line}", BadRow("a CSV row of another length than the header")
            continue
        for place, name in others:
            if (cell := cells[place]) and not cell.isspace():
                unread[name] += 1
        yield f"{path}:{line}", {key: cells[place] for key, place in header.places.items()}


def _other_columns(header: Header) -> list[tuple[int, str]]:
    """Places and names of the columns that nobody reads. A number tells those of one name apart."""
    read, names = header.places.values(), header.names
    return [
        (place, name if name.strip() and names.count(name) == 1 else f"{name} (column {place + 1})".strip())
        for place, name in enumerate(names)
        if place not in read
    ]


def _find_header(path: Path, columns: dict[str, str] | None, kind: Kind | None) -> Header | None:
    """Reads the first row with each delimiter, and returns the one reading that fits a format. None without rows.

    Raises UserError when no reading fits, or several do, or a column that the format reads is there twice.
    """
    with _open_text(path) as file:
        separator = _SEPARATOR_LINE.fullmatch(file.readline(100))
    fitting: dict[tuple[str, ...], Header] = {}
    others: dict[str, tuple[str, ...]] = {}
    faults = []
    by_name = TSV_DELIMITERS if unpacked_suffix(path).lower() == ".tsv" else DELIMITERS
    for delimiter in (separator[1],) if separator else by_name:
        try:
            first = next(_records(path, delimiter), None)
            if first is None:
                return None
            names = tuple(first[1])
            if (matched := match_keys(names, columns, kind)) is None:
                others[delimiter] = names
            else:
                fitting.setdefault(names, Header(delimiter, names, matched.places))
        except BadRow as fault:
            faults.append(UserError(f"{path}: its header: {fault}"))
        except UserError as error:
            faults.append(error)
    if len(fitting) > 1:
        found = " and as ".join(str(list(names)) for names in fitting)
        raise UserError(f"{path}: its header can be read as {found}; name the delimiter in a first line, as in sep=;")
    if fitting:
        return next(iter(fitting.values()))
    delimiter, names = max(others.items(), key=lambda item: len(item[1]), default=("", ()))
    if faults and len(names) < 2:
        raise faults[0]
    raise UserError(
        f"{path}: no format has the columns of its first line: {quoted(names)} (delimiter {delimiter!r}); "
        f"name them {WANTED_KEYS[kind]}"
    )


def _open_text(path: Path) -> TextIO:
    return io.TextIOWrapper(open_data(path), encoding="utf-8-sig", newline="", errors="surrogateescape")


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields each row that is not empty, with the number of its last line."""
    with _open_text(path) as file:
        reader = csv.reader(_lines_of_text(path, file), delimiter=delimiter, strict=True)
        begins = 1
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
                begins = reader.line_num + 1
        except csv.Error as error:
            row = f" (the row begins in line {begins})" if begins < reader.line_num else ""
            raise UserError(f"{path}:{reader.line_num}: broken CSV: {error}{row}") from error


def _lines_of_text(path: Path, file: TextIO) -> Iterator[str]:
    """Yields the file's lines, an empty one in place of a line sep=;. No more than MAX_ROW_BYTES are in memory."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES and not line.endswith(("\n", "\r")):
            raise UserError(f"{path}:{number}: broken CSV: a line of more than {MAX_ROW_BYTES >> 20} MiB")
        if not line.isascii() and not is_utf8(line):
            raise UserError(
                f"{path} is not UTF-8 (line {number}); if Excel saved it, convert it: {convert_command(path)}"
            )
        yield "\n" if number == 1 and _SEPARATOR_LINE.fullmatch(line) else line
