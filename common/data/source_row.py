"""A row as it stands in a source, the place it comes from, and the reason why a row cannot be used."""

from typing import Any

MAX_ROW_BYTES = (
    16 << 20
)  # of a line, or of a CSV cell; a book has 1 MiB, and Python takes several times that to parse it


class BadRow(Exception):
    """A row cannot be used. The message is the kind of fault, without the place: the report counts rows by it."""


class NotToLearn(BadRow):
    """A row that says itself that nothing of it is to be learnt: no fault, so it is counted apart."""


Row = dict[str, Any]
PlacedRow = tuple[str, Row | BadRow]  # the place is "my.jsonl:12", or "my.json, entry 3" where lines say nothing
