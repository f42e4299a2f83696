"""Tokenises the rows of a source, over all cores, and counts and names those that cannot be used.

This process reads the rows; others turn them into examples, some hundred at a time. The results are put together in the
order of the source, so they are the same whatever the number of processes.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from common.control_group import available_cpus
from common.conversations.conversation import AnyExample
from common.conversations.row_reader import RowReader
from common.data.answers import join_answers, parts_to_encode
from common.data.cutting import fit_example
from common.data.examples import Examples
from common.data.report import DataReport, UnusableRows
from common.machine.workers import map_in_order
from common.recipe import DataSpec, UserError
from common.sources.files import read_rows
from common.sources.source_files import find_files, is_file
from common.sources.source_row import BadRow, OtherKind, PlacedRow
from common.tokens.chat_format import ChatFormat, Tokens

PROGRESS_SECONDS = 10.0  # between two lines of progress
CHUNK_ROWS = 256  # rows that a process gets at once: fewer where they are long
CHUNK_CHARACTERS = 1 << 20
CHUNKS_HERE = 8  # are tokenised in this process, before it starts others: a small source has no more

PlacedExample = tuple[str, AnyExample | BadRow]


def tokenise_source(
    spec: DataSpec, source: str, split: str, chat_format: ChatFormat, seq_len: int
) -> tuple[Examples, DataReport]:
    """Tokenises every usable row of a source, into examples of at most seq_len tokens. Prints the report.

    Raises UserError when the source cannot be read, and UnusableRows when too many of its rows cannot be used.
    """
    report, examples, printed_at = DataReport(source, seq_len), Examples(), time.monotonic()
    if is_file(source) and (files := find_files(source)).saved is None:
        report.files, report.ignored = len(files.files), files.ignored
    tokeniser = Tokeniser(source, chat_format, spec, seq_len)
    for found, counted in _tokenise_chunks(tokeniser, chunked(rows_of(spec, source, split, report.unread))):
        examples.extend(found)
        report.merge(counted)
        if time.monotonic() - printed_at > PROGRESS_SECONDS:
            print(f"  {report.read:,} rows of {source} read, {report.tokens:,} tokens", flush=True)
            printed_at = time.monotonic()
    report.copies = examples.copies()
    print("\n".join(report.lines()))
    try:
        report.refuse_unusable(spec.max_bad_share, spec.max_long_share)
    except UserError as error:
        raise UnusableRows(str(error), report) from None
    return examples, report


class Tokeniser:
    """Turns rows of one source into examples. The first good row that it is given decides the format of all."""

    def __init__(self, source: str, chat_format: ChatFormat, spec: DataSpec, seq_len: int) -> None:
        self.source, self.chat_format, self.train_on, self.seq_len = source, chat_format, spec.train_on, seq_len
        self.long_texts = spec.long_texts
        # Rendered texts stand in the column text, whatever the others would make of a row.
        self.reader = RowReader(columns=spec.columns or ({"text": "text"} if spec.rendered else None), kind=spec.kind)

    def __call__(self, rows: Iterable[PlacedRow]) -> tuple[Examples, DataReport]:
        """Returns the examples of these rows, and a report of these rows alone."""
        examples, report = Examples(), DataReport(self.source, self.seq_len)
        for _, parts in self.tokenise(rows, report):
            examples.append(parts)
        return examples, report

    def tokenise(self, rows: Iterable[PlacedRow], report: DataReport) -> Iterator[tuple[str, list[Tokens]]]:
        """Yields the place of each usable row, and the examples that it becomes. Counts all rows in the report."""
        read = list(read_each(rows, self.reader, report))
        parts = {number: parts_to_encode(one) for number, (_, one) in enumerate(read) if not isinstance(one, BadRow)}
        encoded = iter(
            self.chat_format.encode_batch([part for several in parts.values() for part in several], self.train_on)
        )
        for number, (place, example) in enumerate(read):
            try:
                if isinstance(example, BadRow):
                    raise example
                tokens = join_answers(example, list(islice(encoded, len(parts[number]))))
                report.add_length(len(tokens.input_ids))
                fitted = fit_example(example, tokens, self.seq_len, self.chat_format, self.train_on, self.long_texts)
            except BadRow as fault:
                report.add_unused(fault, place)
            else:
                report.add_kept(tokens, fitted)
                yield place, fitted


def rows_of(spec: DataSpec, source: str, split: str, unread: Counter[str] | None = None) -> Iterator[PlacedRow]:
    """Yields every row of one of the spec's sources, as read_rows."""
    return read_rows(
        source,
        split=split,
        revision=spec.revision,
        config=spec.config,
        columns=spec.columns,
        kind=spec.kind,
        unread=unread,
    )


def read_examples(source: str, report: DataReport) -> Iterator[tuple[str, AnyExample]]:
    """Yields the usable rows of a source, of any kind, each with its place. Adds the others to the report.

    Raises UserError when the source cannot be read.
    """
    for place, example in read_each(read_rows(source, kind=None, unread=report.unread), RowReader(kind=None), report):
        if isinstance(example, BadRow):
            report.add_unused(example, place)
        else:
            yield place, example


def read_each(rows: Iterable[PlacedRow], reader: RowReader, report: DataReport) -> Iterator[PlacedExample]:
    """Yields each row as an example, or as the BadRow that says why it is none. Counts what was read.

    Raises UserError for data of another kind than the reader's.
    """
    for place, row in rows:
        report.read += 1
        example: AnyExample | BadRow
        try:
            example = row if isinstance(row, BadRow) else reader.read(row)
        except OtherKind as fault:
            raise UserError(f"{place}: {fault}") from fault
        except BadRow as fault:
            example = fault
        report.format_name = reader.format_name
        yield place, example
    report.unread += reader.unread
    reader.unread.clear()


def chunked(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    """Yields the rows in lists of up to CHUNK_ROWS, and of about CHUNK_CHARACTERS at most."""
    chunk, size = list[PlacedRow](), 0
    for placed in rows:
        chunk.append(placed)
        size += _characters(placed[1])
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _characters(value: Any) -> int:
    """About how many characters a row has in its texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 8


def _tokenise_chunks(tokeniser: Tokeniser, chunks: Iterator[list[PlacedRow]]) -> Iterator[tuple[Examples, DataReport]]:
    """Yields the examples and the report of each chunk. The processes for the later ones know the format."""
    for number, chunk in enumerate(chunks, 1):
        yield tokeniser(chunk)
        if number >= CHUNKS_HERE and tokeniser.reader.format_name:
            break
    yield from map_in_order(tokeniser, chunks, available_cpus())
