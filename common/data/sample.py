"""Draws a few examples of a source to be looked at: read, tokenised and shortened as a run does it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from common.conversations.conversation import AnyExample, Conversation
from common.data.answers import parts_to_encode
from common.data.report import DataReport
from common.data.tokenise import Tokeniser, rows_of
from common.recipe import DataSpec
from common.sources.source_row import BadRow, PlacedRow
from common.tokens.chat_format import ChatFormat, Tokens

MAX_ROWS = 100_000  # from the first on: reading a million takes many seconds
CANDIDATES = 200  # rows that are tokenised, to choose from
READABLE_TOKENS = 300  # a longer example is shown only where there is none, or none that shows as much

SourceRow = tuple[str, PlacedRow]  # with the name of its source


@dataclass(frozen=True)
class DrawnExample:
    """An example as it is trained. place: of its row, as a report names it. peculiarities: see _peculiarities."""

    place: str
    tokens: Tokens
    peculiarities: frozenset[str]


def draw_examples(spec: DataSpec, chat_format: ChatFormat, seq_len: int, seed: int, count: int) -> list[DrawnExample]:
    """Returns up to `count` different examples of the sources, in their order. The same seed draws the same ones.

    One of them has as many peculiarities as an example here can have: what is rare is not missed. The others are short
    enough to be read, where there are such. Raises UserError where a source cannot be read.
    """
    if not count:
        return []
    dice, found = Random(seed), dict[tuple[int, ...], DrawnExample]()  # by their token ids: of equal ones the first
    tokenisers = {source: Tokeniser(source, chat_format, spec, seq_len) for source, _ in spec.mixture}
    for source, row in _draw(_read_first(spec), dice):
        for example in _tokenise_row(tokenisers[source], row):
            found.setdefault(tuple(example.tokens.input_ids), example)
    different = list(found.values())
    at_random = dice.sample(different, len(different))
    by_length = sorted(at_random, key=lambda example: max(READABLE_TOKENS, len(example.tokens.input_ids)))
    first = sorted(by_length, key=lambda example: len(example.peculiarities), reverse=True)[:1]
    chosen = [*first, *(example for example in by_length if example not in first)][:count]
    return sorted(chosen, key=different.index)


def _read_first(spec: DataSpec) -> Iterator[SourceRow]:
    """Yields the first rows of each source, each with the name of its source: MAX_ROWS together."""
    for source, _ in spec.mixture:
        rows = rows_of(spec, source, spec.split)
        yield from ((source, row) for row in islice(rows, MAX_ROWS // len(spec.mixture)))


def _draw(rows: Iterable[SourceRow], dice: Random) -> list[SourceRow]:
    """Returns up to CANDIDATES rows in their order. All rows are as likely (algorithm R)."""
    drawn: list[tuple[int, SourceRow]] = []
    for number, row in enumerate(rows):
        if number < CANDIDATES:
            drawn.append((number, row))
        elif (place := dice.randrange(number + 1)) < CANDIDATES:
            drawn[place] = (number, row)
    return [row for _, row in sorted(drawn, key=lambda pair: pair[0])]


def _tokenise_row(tokeniser: Tokeniser, row: PlacedRow) -> Iterator[DrawnExample]:
    """Yields the first example that a row becomes; none of a row that a run would not use."""
    for place, parts in tokeniser.tokenise([row], DataReport(tokeniser.source, tokeniser.seq_len)):
        assert not isinstance(row[1], BadRow)  # it has become an example
        yield DrawnExample(place, parts[0], _peculiarities(tokeniser.reader.read(row[1]), parts[0]))


def _peculiarities(example: AnyExample, tokens: Tokens) -> frozenset[str]:
    """What is not in every conversation: several answers, a system message, tools, thoughts, notes."""
    found = set(tokens.notes)
    for conversation in parts_to_encode(example):
        if isinstance(conversation, str):
            continue
        messages = conversation.messages
        there = {
            "a system message": any(message.role == "system" for message in messages),
            "a tool's result": any(message.role == "tool" for message in messages),
            "several answers": sum(message.role == "assistant" for message in messages) > 1,
            "tools": bool(conversation.tools) or any(message.tool_calls for message in messages),
            "thoughts": any(message.reasoning for message in messages),
            "an answer that is not trained": isinstance(example, Conversation)
            and not all(m.is_trained for m in messages if m.role == "assistant"),
        }
        found |= {name for name, is_there in there.items() if is_there}
    return frozenset(found)
