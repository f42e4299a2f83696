"""Draws a few examples of a source to be looked at: read, tokenised and shortened as a run does it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from common.data.chat_format import ChatFormat, Tokens
from common.data.conversation import Example
from common.data.packing import fit_to_row
from common.data.report import DataReport
from common.data.source_row import BadRow
from common.data.tokenise import read_examples
from common.recipe import DataSpec

MAX_ROWS = 100_000  # from the first on: reading a million takes many seconds
CANDIDATES = 200  # rows that are tokenised, to choose from
READABLE_TOKENS = 300  # a longer example is shown only where there is none, or none that shows as much


@dataclass(frozen=True)
class DrawnExample:
    """An example as it is trained. place: of its row, as a report names it. peculiarities: see _peculiarities."""

    place: str
    tokens: Tokens
    peculiarities: frozenset[str]


def draw_examples(spec: DataSpec, chat_format: ChatFormat, seq_len: int, seed: int, count: int) -> list[DrawnExample]:
    """Returns up to `count` different examples of the sources, in their order. The same seed draws the same ones.

    One of them has as many peculiarities as an example here can have: what is rare is not missed. The others
    are short enough to be read, where there are such. Raises UserError where the source cannot be read.
    """
    if not count:
        return []
    drawn: list[tuple[int, DrawnExample]] = []
    seen = set()
    for number, (place, example) in _draw(_read_first(spec), Random(seed)):
        try:
            tokens = fit_to_row(chat_format.encode(example, spec.train_on), seq_len, is_text=isinstance(example, str))
        except BadRow:
            continue
        if (ids := tuple(tokens[0].input_ids)) not in seen:
            seen.add(ids)
            drawn.append((number, DrawnExample(place, tokens[0], _peculiarities(example, tokens[0]))))
    # sorted keeps the order of the draw among equals
    by_length = sorted(drawn, key=lambda pair: max(READABLE_TOKENS, len(pair[1].tokens.input_ids)))
    first = sorted(by_length, key=lambda pair: len(pair[1].peculiarities), reverse=True)[:1]
    chosen = [*first, *(pair for pair in by_length if pair not in first)][:count]
    return [example for _, example in sorted(chosen, key=lambda pair: pair[0])]


def _read_first(spec: DataSpec) -> Iterator[tuple[str, Example]]:
    """Yields the first usable rows of each source, each with its place: MAX_ROWS together."""
    for source, _ in spec.mixture:
        rows = read_examples(source, DataReport(source), split=spec.split, revision=spec.revision)
        yield from islice(rows, MAX_ROWS // len(spec.mixture))


def _draw(rows: Iterable[tuple[str, Example]], random: Random) -> list[tuple[int, tuple[str, Example]]]:
    """Returns up to CANDIDATES rows in random order, each with its number. All rows are as likely (algorithm R)."""
    drawn: list[tuple[int, tuple[str, Example]]] = []
    for number, row in enumerate(rows):
        if number < CANDIDATES:
            drawn.append((number, row))
        elif (place := random.randrange(number + 1)) < CANDIDATES:
            drawn[place] = (number, row)
    random.shuffle(drawn)
    return drawn


def _peculiarities(example: Example, tokens: Tokens) -> frozenset[str]:
    """What is not in every conversation: several answers, a system message, tools, thoughts, notes."""
    found = set(tokens.notes)
    if not isinstance(example, str):
        messages = example.messages
        found |= {message.role for message in messages} - {"user", "assistant"}
        there = {
            "several answers": sum(message.role == "assistant" for message in messages) > 1,
            "tools": bool(example.tools) or any(message.tool_calls for message in messages),
            "thoughts": any(message.reasoning for message in messages),
            "an answer that is not trained": not all(m.is_trained for m in messages if m.role == "assistant"),
        }
        found |= {name for name, is_there in there.items() if is_there}
    return frozenset(found)
