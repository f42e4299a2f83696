"""A row as it stands in a source, the place it comes from, and the reason why a row cannot be used."""

from dataclasses import dataclass
from typing import Any

# Of a line, or of a CSV cell: a book has 1 MiB, and Python takes several times that to parse it.
MAX_ROW_BYTES = 16 << 20


class BadRow(Exception):
    """A row cannot be used. The message is the kind of fault, without the place: the report counts rows by it."""


@dataclass(frozen=True)
class Unreadable:
    """Stands in a row for a value that nobody can read: a NaN, or that of a key which occurs twice.

    It is no fault of the row where no format reads that field. Nothing else is of this type, so what checks the type of
    a value refuses it.
    """

    fault: str


def readable(value: Any) -> Any:
    """Returns the value as it is. Raises BadRow where it, or anything in it, is Unreadable."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Unreadable):
            raise BadRow(part.fault)
        if isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part
    return value


class NotToLearn(BadRow):
    """A row that says itself that nothing of it is to be learnt: no fault, so it is counted apart."""


class OtherKind(BadRow):
    """The row is of data that is for another kind of recipe (DataSpec.kind): the source as a whole is refused."""


Row = dict[str, Any]
PlacedRow = tuple[str, Row | BadRow]  # the place is "my.jsonl:12", or "my.json, entry 3" where lines say nothing
