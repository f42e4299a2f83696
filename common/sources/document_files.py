"""Reads .txt files: each is one document, and becomes one row of plain text."""

from collections.abc import Iterator
from pathlib import Path

from common.recipe import UserError
from common.sources.source_row import MAX_ROW_BYTES, PlacedRow
from common.sources.text_files import check_start, convert_command
from common.sources.unpacking import command_on, open_data


def document_rows(path: Path) -> Iterator[PlacedRow]:
    """Yields the text of a file as one row, with the line ends of Unix and without a byte order mark.

    A line is no row: a document has several, and what is learnt at the end of a row is that a text ends there.
    Raises UserError for a text of more than MAX_ROW_BYTES.
    """
    check_start(path)
    with open_data(path) as file:
        content = file.read(MAX_ROW_BYTES + 1)
    if len(content) > MAX_ROW_BYTES:
        as_lines = command_on(path, """jq -Rc 'select(. != "") | {text: .}'""", "texts.jsonl")
        raise UserError(
            f"{path} is one text of more than {MAX_ROW_BYTES >> 20} MiB: a .txt file is one document. Write a file for "
            f"each and name their folder; where each line is a text of its own: {as_lines}"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it: {convert_command(path)}") from error
    if content:
        yield str(path), {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
