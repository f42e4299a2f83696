"""Reads a row of any accepted format as a conversation or as plain text, and checks it.

A row that is neither raises BadRow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from common.data.files import BadRow, Row

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


Conversation = tuple[Message, ...]
Example = Conversation | str  # a str is plain text, all of which is trained

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    # what ShareGPT calls the user and the assistant
    "human": "user",
    "gpt": "assistant",
}


def _require_text(value: Any, name: str) -> str:
    """Returns the value when it is text that can be trained. `name` says in the message of BadRow what it is."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {'missing' if value is None else 'not text'}")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} holds a lone surrogate, which is not text") from error
    return value


def _read_messages(entries: Any, role_key: str, content_key: str) -> Conversation:
    """Reads a list of messages: an optional system message, then user and assistant in turn, an assistant last.

    Raises BadRow for any other roles or order.
    """
    if not isinstance(entries, list) or not entries:
        raise BadRow("the list of messages is missing or empty")
    messages = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadRow("a message is not an object")
        role = ROLES.get(str(entry.get(role_key)))
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
    return tuple(messages)


def _from_messages(row: Row) -> Conversation:
    return _read_messages(row["messages"], "role", "content")


def _from_sharegpt(row: Row) -> Conversation:
    entries = row["conversations"]
    named = isinstance(entries, list) and entries and isinstance(entries[0], dict) and "role" in entries[0]
    return _read_messages(entries, "role", "content") if named else _read_messages(entries, "from", "value")


def _from_prompt_completion(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _read_messages(prompt + completion, "role", "content")
    return (
        Message("user", _require_text(prompt, "prompt")),
        Message("assistant", _require_text(completion, "completion")),
    )


def _from_alpaca(row: Row) -> Conversation:
    instruction, extra = _require_text(row["instruction"], "instruction"), row.get("input")
    user = f"{instruction}\n\n{_require_text(extra, 'input')}" if extra not in (None, "") else instruction
    return (Message("user", user), Message("assistant", _require_text(row["output"], "output")))


def _from_text(row: Row) -> str:
    return _require_text(row["text"], "text")


class Format(NamedTuple):
    name: str
    keys: tuple[str, ...]  # which every row of this format has
    read: Callable[[Row], Example]


# A row is of the first format whose keys it has.
FORMATS = (
    Format("messages", ("messages",), _from_messages),
    Format("ShareGPT", ("conversations",), _from_sharegpt),
    Format("prompt/completion", ("prompt", "completion"), _from_prompt_completion),
    Format("Alpaca", ("instruction", "output"), _from_alpaca),
    Format("text", ("text",), _from_text),
)


def format_of(row: Row) -> str:
    """Returns the name of the row's format. Raises BadRow when its keys fit none."""
    for known in FORMATS:
        if all(key in row for key in known.keys):
            return known.name
    wanted = ", or ".join("+".join(known.keys) for known in FORMATS)
    raise BadRow(f"no format has these keys; a row needs {wanted}")


def to_example(row: Row, format_name: str) -> Example:
    """Reads a row of this format. Raises BadRow, which says what is wrong, when the row is not a good one."""
    if format_of(row) != format_name:
        raise BadRow(f"the format is {format_of(row)}, not {format_name} as above it")
    read = next(known.read for known in FORMATS if known.name == format_name)
    return read(row)
