"""A row in any accepted format becomes a conversation, or a plain text; a row that is neither is a BadRow."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from common.data.files import BadRow, Row

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


Conversation = tuple[Message, ...]
Example = Conversation | str  # a str is a plain text, trained whole

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    # ShareGPT's names
    "human": "user",
    "gpt": "assistant",
}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is {'missing' if value is None else 'not text'}")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} holds a lone surrogate, which is not text") from error
    return value


def _conversation(entries: Any, role_key: str, content_key: str) -> Conversation:
    """Checks roles and order: an optional system message, then user and assistant in turn, an assistant last."""
    if not isinstance(entries, list) or not entries:
        raise BadRow("the list of messages is missing or empty")
    messages = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadRow("a message is not an object")
        role = ROLES.get(str(entry.get(role_key)))
        if role is None:
            raise BadRow(f"role {entry.get(role_key)!r:.40} is not system, user or assistant")
        messages.append(Message(role, _text(entry.get(content_key), f"the {role}'s text")))
    turns = messages[1:] if messages[0].role == "system" else messages
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            raise BadRow(f"a turn of the {message.role} where the {expected}'s should be")
    if not turns or turns[-1].role != "assistant":
        raise BadRow("the last turn is not the assistant's")
    return tuple(messages)


def _from_messages(row: Row) -> Conversation:
    return _conversation(row["messages"], "role", "content")


def _from_sharegpt(row: Row) -> Conversation:
    entries = row["conversations"]
    named = isinstance(entries, list) and entries and isinstance(entries[0], dict) and "role" in entries[0]
    return _conversation(entries, "role", "content") if named else _conversation(entries, "from", "value")


def _from_prompt_completion(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(prompt + completion, "role", "content")
    return (Message("user", _text(prompt, "prompt")), Message("assistant", _text(completion, "completion")))


def _from_alpaca(row: Row) -> Conversation:
    instruction, extra = _text(row["instruction"], "instruction"), row.get("input")
    user = f"{instruction}\n\n{_text(extra, 'input')}" if extra not in (None, "") else instruction
    return (Message("user", user), Message("assistant", _text(row["output"], "output")))


def _from_text(row: Row) -> str:
    return _text(row["text"], "text")


# Name of the format, the keys that tell it, how a row is read; the first whose keys are all there is taken.
FORMATS: tuple[tuple[str, tuple[str, ...], Callable[[Row], Example]], ...] = (
    ("messages", ("messages",), _from_messages),
    ("ShareGPT", ("conversations",), _from_sharegpt),
    ("prompt/completion", ("prompt", "completion"), _from_prompt_completion),
    ("Alpaca", ("instruction", "output"), _from_alpaca),
    ("text", ("text",), _from_text),
)


def format_of(row: Row) -> str:
    """The name of the row's format. Raises BadRow when its keys fit none."""
    for name, keys, _ in FORMATS:
        if all(key in row for key in keys):
            return name
    wanted = ", or ".join("+".join(keys) for _, keys, _ in FORMATS)
    raise BadRow(f"no format has these keys; a row needs {wanted}")


def to_example(row: Row, format_name: str) -> Example:
    """Raises BadRow, saying what is wrong, when the row is not a good row of that format."""
    if format_of(row) != format_name:
        raise BadRow(f"the format is {format_of(row)}, not {format_name} as above it")
    read = next(read for name, _, read in FORMATS if name == format_name)
    return read(row)
