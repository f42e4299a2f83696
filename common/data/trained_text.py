"""A tokenised example as text for people: which part is trained, one message under the other."""

import os
from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerFast

from common.tokens.chat_format import Tokens
from common.tokens.labels import IGNORED

JOINERS = "\u200c\u200d"  # invisible parts of emoji and of words in several scripts
INDENT = "    "
GOES_ON = "  ↳ "  # before a line that the text does not begin: what is trained stands on lines of its own
MAX_PIECE_CHARACTERS = 2000  # that are printed of a piece, and lines of an example: the text of a book has more
MAX_LINES = 40

TextPart = tuple[str, bool]  # a text, and whether it is trained


def trained_pieces(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> list[TextPart]:
    """Splits the text of the tokens where training begins or ends. The pieces together are the text of all tokens."""
    pieces, before, start = [], list[int](), 0
    for is_trained, run in groupby(tokens.labels, key=lambda label: label != IGNORED):
        end = start + len(list(run))
        ids = tokens.input_ids[start:end]
        # Behind the run before it: decoders drop the space before the first token that they are given. Behind all that
        # stands before, a conversation of 20,000 turns would be decoded 20,000 times.
        text, decoded = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (before, before + ids))
        pieces.append((decoded[len(os.path.commonprefix([text, decoded])) :], is_trained))
        before, start = ids, end
    return pieces


def escape(text: str) -> str:
    """The text without characters that a terminal would obey instead of showing them: they become escapes."""
    return "".join(c if c.isprintable() or c in JOINERS else repr(c)[1:-1] for c in text)


def lay_out(pieces: Sequence[TextPart], *, on_terminal: bool) -> list[str]:
    """Returns the lines of an example. Each trained piece, and what follows it, begins a line of its own.

    A line that begins so, where the text has no line break, begins with GOES_ON. Trained text is underlined on a
    terminal; elsewhere it stands between ⟦ and ⟧. A long example is shortened in its middle, which says so.
    """
    lines: list[str] = []
    line, indent = "", INDENT
    for text, is_trained in pieces:
        if line and not text.startswith("\n"):
            lines.append(indent + line)
            line, indent = "", GOES_ON
        parts = _shorten(text).split("\n")
        for number, part in enumerate(parts):
            if number:
                lines.append(indent + line)
                line, indent = "", INDENT
            shown = escape(part)
            if is_trained and on_terminal:
                shown = f"\033[4m{shown}\033[0m" if shown else ""
            elif is_trained:
                shown = ("" if number else "⟦") + shown + ("⟧" if number == len(parts) - 1 else "")
            line += shown
    if line:  # otherwise the text ends in a line break
        lines.append(indent + line)
    lines = [line.rstrip() for line in lines]
    if len(lines) <= MAX_LINES:
        return lines
    first = MAX_LINES * 3 // 4
    last = MAX_LINES - first
    return [*lines[:first], f"{INDENT}[… {len(lines) - MAX_LINES:,} lines …]", *lines[-last:]]


def _shorten(text: str) -> str:
    left_out = len(text) - MAX_PIECE_CHARACTERS
    if left_out <= 0:
        return text
    first = MAX_PIECE_CHARACTERS * 3 // 4
    return f"{text[:first]} [… {left_out:,} characters …] {text[first + left_out :]}"
