"""The texts of rows and messages: which can be trained, and what a content that is a list of parts says."""

import unicodedata
from typing import Any, NamedTuple

from common.sources.json_files import parse_json
from common.sources.source_row import BadRow, readable
from common.sources.text_files import is_utf8

# Of Unicode's Default_Ignorable_Code_Point, those that are neither blanks nor of the category Cf (format).
_WITHOUT_SHAPE = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0x180B, 0x1810)}
_WITHOUT_SHAPE |= {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}  # variation selectors

TEXT_PARTS = ("text", "input_text", "output_text")  # the latter two are those of OpenAI's Responses
REASONING_PARTS = ("reasoning", "thinking")
_TEXT_KEYS = ("text", "value", "content")  # where a part has its text


def is_blank(text: str) -> bool:
    """Returns whether nothing of the text can be seen: only blanks, control, zero-width and other such characters."""
    if "!" <= text[:1] <= "~":  # the most common beginnings
        return False
    return not text.strip() or all(
        c.isspace() or unicodedata.category(c) in ("Cc", "Cf") or ord(c) in _WITHOUT_SHAPE for c in text
    )


def is_nothing(value: Any) -> bool:
    """Returns whether a value says nothing: null, a blank text, an empty list, an object of nulls as a table has it."""
    if isinstance(value, dict):
        return all(part is None or (isinstance(part, dict) and is_nothing(part)) for part in value.values())
    return value is None or (is_blank(value) if isinstance(value, str) else value == [])


def require_text(value: Any, name: str) -> str:
    """Returns the value when it is text that can be trained. `name` says in the message of BadRow what it is."""
    text = value
    if isinstance(value, list):
        text, thoughts, _ = join_parts(value, name)
        if thoughts:
            raise BadRow(f"{name} has thoughts, which are the assistant's")
    if not isinstance(text, str):
        readable(text)
        raise BadRow(f"{name} is {'missing' if text is None else 'not text'}")
    if is_blank(text):
        raise BadRow(f"{name} is {'of invisible characters alone' if text.strip() else 'empty'}")
    return require_utf8(text, name)


def require_utf8(text: str, name: str) -> str:
    if not text.isascii() and not is_utf8(text):
        raise BadRow(f"{name} holds a lone surrogate, which is not text")
    return text


def optional_text(value: Any, name: str) -> str | None:
    """Returns the text, or None where there is nothing to see."""
    return None if is_nothing(value) else require_text(value, name)


def parse_cell(text: str, name: str) -> Any:
    """Returns the value that a text holds as JSON, as it is written to CSV files and to columns of text."""
    try:
        return parse_json(text) if text.strip() else None
    except BadRow as fault:
        by_python = text.lstrip().startswith(("[", "{")) and "'" in text
        hint = ", but a list as Python prints it; write it with json.dumps" if by_python else ""
        raise BadRow(f"{name} are text, {fault}{hint}") from fault


class Parts(NamedTuple):
    text: str | None  # None where a text is missing
    reasoning: str  # "" where there is none
    unread: tuple[str, ...]  # keys of parts that say something and are not used


def join_parts(parts: list[Any], name: str) -> Parts:
    """Joins the texts of a content's parts as they stand: {"type": "text", "text": …}, of which one may be a bare text.

    Thoughts are parts of type reasoning or thinking, before the text. Raises BadRow for any other part, and for several
    bare texts, which may be the paragraphs of one, or a better and a worse answer.
    """
    if (count := sum(isinstance(part, str) for part in parts)) > 1:
        raise BadRow(f"{name} is a list of {count} texts; join them, or keep the one that is meant")
    texts: list[str] = []
    thoughts: list[str] = []
    unread: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = readable(part.get("type")) if isinstance(part, dict) else None
        if kind is None:
            raise BadRow(f"{name} is a list, and not of parts with a type")
        if kind not in TEXT_PARTS + REASONING_PARTS:
            raise BadRow(f"{name} has a part of type {kind!r:.40}; only text can be trained")
        keys = _TEXT_KEYS if kind in TEXT_PARTS else (*_TEXT_KEYS, *REASONING_PARTS)
        found = {key: part[key] for key in keys if part.get(key) is not None}
        unread += [key for key, value in part.items() if key not in ("type", *keys) and not is_nothing(value)]
        if not found:
            return Parts(None, "", ())
        if len(found) > 1:
            raise BadRow(f"{name} has a part with several texts: {', '.join(found)}; leave one")
        text = _text_of_part(next(iter(found.values())), name)
        if kind in REASONING_PARTS and any(texts):
            raise BadRow(f"{name} has thoughts that follow its text")
        (texts if kind in TEXT_PARTS else thoughts).append(text)
    return Parts("".join(texts), "".join(thoughts), tuple(unread))


def _text_of_part(value: Any, name: str) -> str:
    """A part's text, which Mistral's thinking has as parts of its own."""
    if isinstance(value, list):
        value = join_parts(value, name).text
    if not isinstance(readable(value), str):
        raise BadRow(f"{name} is not text")
    return str(value)
