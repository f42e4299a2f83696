"""Reads rows from JSONL, JSON, CSV and Parquet files, or of hub data sets, each with the place it comes from."""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.data.hub_rows import hub_rows
from common.recipe import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MAX_LINE_BYTES = 16 << 20  # a book has 1 MiB; to parse a line, Python takes several times its size
MAX_JSON_BYTES = 256 << 20  # a .json file is read into memory whole


class BadRow(Exception):
    """A row cannot be used. The message is the kind of fault, without the place: the report counts rows by it."""


Row = dict[str, Any]
PlacedRow = tuple[str, Row | BadRow]  # the place is "my.jsonl:12", or "my.json, entry 3" where lines say nothing


def is_file(source: str) -> bool:
    """Returns whether a source names a file, which may be missing, and not a hub data set."""
    return Path(source).exists() or source.lower().endswith(SUFFIXES) or source.startswith((".", "/", "~"))


def read_rows(source: str, *, split: str = "train", revision: str | None = None) -> Iterator[PlacedRow]:
    """Yields every row of a file, or of a hub data set's split, in order. A row that cannot be read is a BadRow.

    Raises UserError when the source as a whole cannot be read.
    """
    if not is_file(source):
        yield from hub_rows(source, split, revision)
        return
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source} is a folder; name one {', '.join(SUFFIXES)} file")
    if not path.exists():
        raise UserError(f"there is no data file {source} (looked in {Path.cwd()})")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{source} is not one of {', '.join(SUFFIXES)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}") from error


def _refuse_constant(name: str) -> Any:
    """For json.loads, which otherwise accepts NaN and Infinity."""
    raise ValueError(f"{name} is not JSON")


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> Row:
    """Makes a JSON object for json.loads. Raises BadRow when a key occurs twice: it is unclear which value counts."""
    row = dict(pairs)
    if len(row) != len(pairs):
        raise BadRow("a key occurs twice in a JSON object")
    return row


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object_of_pairs)
    except (ValueError, RecursionError) as error:
        raise BadRow("invalid JSON") from error


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields the file's lines, and None for a line that is too long, which is never in memory whole."""
    while line := file.readline(MAX_LINE_BYTES):
        too_long = len(line) == MAX_LINE_BYTES
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None if too_long else line


def _check_encoding(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path} > utf8{path.suffix}")
    if start.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is gzip-compressed; unpack it first: gunzip")


def _jsonl_rows(path: Path) -> Iterator[PlacedRow]:
    _check_encoding(path)
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            place = f"{path}:{number}"
            try:
                if line is None:
                    raise BadRow(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                yield place, _as_row(_parse(text))
            except UnicodeDecodeError:
                yield place, BadRow("not UTF-8")
            except BadRow as fault:
                yield place, fault


def _as_row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise BadRow("not a JSON object")
    return value


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    _check_encoding(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, too large to be read whole; make it .jsonl")
    try:
        entries = json.loads(
            path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_object_of_pairs
        )
    except BadRow as error:
        raise UserError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        hint = "; one object a line is .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: invalid JSON: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(entries, list):
        raise UserError(f"{path} holds one {type(entries).__name__}; a .json file is a list of objects")
    for number, entry in enumerate(entries, 1):
        try:
            yield f"{path}, entry {number}", _as_row(entry)
        except BadRow as fault:
            yield f"{path}, entry {number}", fault


def _csv_rows(path: Path) -> Iterator[PlacedRow]:
    _check_encoding(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                # DictReader's marks of fewer cells than the header has, and of more.
                other_length = None in row.values() or None in row
                yield place, BadRow("a CSV row of another length than the header") if other_length else dict(row)
        except csv.Error as error:
            raise UserError(f"{path}:{reader.reader.line_num}: broken CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (after line {reader.line_num})") from error


def _parquet_rows(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
