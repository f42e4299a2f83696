"""Reads a row of any accepted format as a conversation or as plain text, and checks it.

A row that is neither raises BadRow.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

from common.data.conversation import Conversation, Example, Message, Role
from common.data.formats import WANTED_KEYS, match_keys
from common.data.json_files import parse_json
from common.data.source_row import BadRow, Row, readable_itself
from common.data.text_files import is_utf8

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    # what ShareGPT calls the user and the assistant
    "human": "user",
    "gpt": "assistant",
}


# Of Unicode's Default_Ignorable_Code_Point, those that are neither blanks nor of the category Cf (format).
_WITHOUT_SHAPE = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0x180B, 0x1810)}
_WITHOUT_SHAPE |= {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}  # variation selectors


def is_blank(text: str) -> bool:
    """Returns whether nothing of the text can be seen: only blanks, control, zero-width and other such characters."""
    return not text.strip() or all(
        c.isspace() or unicodedata.category(c) in ("Cc", "Cf") or ord(c) in _WITHOUT_SHAPE for c in text
    )


def _require_text(value: Any, name: str) -> str:
    """Returns the value when it is text that can be trained. `name` says in the message of BadRow what it is."""
    if isinstance(value, list):
        value = _join_parts(value, name)
    value = readable_itself(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} is {'missing' if value is None else 'not text'}")
    if is_blank(value):
        raise BadRow(f"{name} is {'of invisible characters alone' if value.strip() else 'empty'}")
    if not is_utf8(value):
        raise BadRow(f"{name} holds a lone surrogate, which is not text")
    return value


def _join_parts(parts: list[Any], name: str) -> str | None:
    """Returns the texts of a message's parts, {"type": "text", "text": ...}, as one. None where a text is missing."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None:
            raise BadRow(f"{name} is a list, and not of parts with a type")
        if kind != "text":
            raise BadRow(f"{name} has a part of type {kind!r:.40}; only text can be trained")
        if part.get("text") is None:
            return None
        if not isinstance(part["text"], str):
            raise BadRow(f"{name} is not text")
        texts.append(part["text"])
    return "".join(texts)


def _read_messages(entries: Any, role_key: str, content_key: str) -> Conversation:
    """Reads a list of messages: an optional system message, then user and assistant in turn, an assistant last.

    Raises BadRow for any other roles or order.
    """
    if isinstance(entries, str):
        entries = _parse_messages(entries)
    if entries is None or entries == []:
        raise BadRow("the list of messages is missing or empty")
    if not isinstance(readable_itself(entries), list):
        raise BadRow("the messages are not a list")
    messages = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadRow("a message is not an object")
        role = ROLES.get(str(readable_itself(entry.get(role_key))))
        if role is None:
            raise BadRow(f"role {entry.get(role_key)!r:.40} is not system, user or assistant")
        messages.append(Message(role, _require_text(entry.get(content_key), f"the {role}'s text")))
    turns = messages[1:] if messages[0].role == "system" else messages
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            raise BadRow(f"a turn of the {message.role} where the {expected}'s should be")
    if not turns or turns[-1].role != "assistant":
        raise BadRow("the last turn is not the assistant's")
    return Conversation(tuple(messages))


def _parse_messages(text: str) -> Any:
    """Returns the messages that a cell holds as JSON, as it is written to CSV files and to columns of text."""
    try:
        return parse_json(text) if text.strip() else None
    except BadRow as fault:
        by_python = text.lstrip().startswith("[") and "'" in text
        hint = ", but a list as Python prints it; write it with json.dumps" if by_python else ""
        raise BadRow(f"the messages are text, {fault}{hint}") from fault


def _from_messages(row: Row) -> Conversation:
    return _read_messages(row["messages"], "role", "content")


def _from_sharegpt(row: Row) -> Conversation:
    entries = row["conversations"]
    if isinstance(entries, str):
        entries = _parse_messages(entries)
    named = isinstance(entries, list) and entries and isinstance(entries[0], dict) and "role" in entries[0]
    return _read_messages(entries, "role", "content") if named else _read_messages(entries, "from", "value")


def _from_prompt_completion(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _read_messages(prompt + completion, "role", "content")
    return _question_and_answer(_require_text(prompt, "prompt"), _require_text(completion, "completion"))


def _from_alpaca(row: Row) -> Conversation:
    user, extra = _require_text(row["instruction"], "instruction"), row.get("input")
    if extra is not None and not (isinstance(extra, str) and is_blank(extra)):
        user += f"\n\n{_require_text(extra, 'input')}"
    return _question_and_answer(user, _require_text(row["output"], "output"))


def _question_and_answer(user: str, assistant: str) -> Conversation:
    return Conversation((Message("user", user), Message("assistant", assistant)))


def _from_text(row: Row) -> str:
    return _require_text(row["text"], "text")


_READERS: dict[str, Callable[[Row], Example]] = {
    "messages": _from_messages,
    "ShareGPT": _from_sharegpt,
    "prompt/completion": _from_prompt_completion,
    "Alpaca": _from_alpaca,
    "text": _from_text,
}  # for each of FORMATS


class RowReader:
    """Reads the rows of one source. The first good row decides the format of all.

    format_name: the format, where it is known already. unread: how many rows had a key, or a message's field, that was
    not used, by its name: "id", "messages[].weight".
    """

    def __init__(self, format_name: str = "") -> None:
        self.format_name = format_name
        self.unread: Counter[str] = Counter()

    def read(self, row: Row) -> Example:
        """Raises BadRow, which says what is wrong, when the row is not a good one."""
        if (matched := match_keys(tuple(row))) is None:
            raise BadRow(f"no format has these keys; a row needs {WANTED_KEYS}")
        self.format_name = self.format_name or matched.format_name
        if matched.format_name != self.format_name:
            raise BadRow(f"the format is {matched.format_name}, not {self.format_name} as above it")
        values = list(row.values())
        return _READERS[self.format_name]({key: values[place] for key, place in matched.places.items()})
