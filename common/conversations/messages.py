"""Reads a list of messages, in the shapes of OpenAI, ShareGPT and others, whatever their order.

What a message says besides its text is used, refused, or noted as unread.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common.conversations.conversation import Message
from common.conversations.message_fields import (
    THOUGHT_FIELDS,
    TOOL_FIELDS,
    USED_FIELDS,
    Fields,
    find_message_fields,
    find_style,
    read_role,
)
from common.conversations.texts import (
    is_blank,
    is_nothing,
    join_parts,
    optional_text,
    parse_cell,
    require_text,
    require_utf8,
)
from common.conversations.tool_calls import read_calls
from common.sources.formats import MEDIA_KEYS
from common.sources.learn_flags import LEARN_FLAGS, UNCLEAR_FLAGS, refuse_unclear, says_learn
from common.sources.source_row import BadRow, readable


class Notes:
    """What is found in one row besides its messages.

    unread: names that say something and are not used. tools: what a system message has under that name.
    """

    def __init__(self) -> None:
        self.unread: set[str] = set()
        self.tools: Any = None

    def add_unread(self, name: str, value: Any) -> None:
        if not is_nothing(value):
            self.unread.add(name)

    def add_tools(self, value: Any) -> None:
        if not is_nothing(value):
            if not is_nothing(self.tools) and value != self.tools:
                raise BadRow("tools are there twice, and differ")
            self.tools = value


def read_messages(entries: Any, key: str, notes: Notes) -> tuple[Message, ...]:
    """Returns the messages of a list, or of its JSON text. key: the row's, under which they are.

    Whether they have role and content, or from and value, is decided by the first. Raises BadRow.
    """
    if isinstance(entries, str):
        entries = parse_cell(entries, "the messages")
    if isinstance(entries, dict):
        entries = _rows_of_table(entries)
    if entries is None or entries == []:
        raise BadRow("the list of messages is missing or empty")
    if not isinstance(entries, list):
        readable(entries)
        raise BadRow("the messages are not a list")
    if not all(isinstance(entry, dict) for entry in entries):
        raise BadRow("a message is not an object")
    by_role, pair = find_style(tuple(entries[0]))
    if pair is not None:
        return tuple(message for entry in entries for message in _read_turns(entry, pair, key, notes))
    fields = [find_message_fields(tuple(entry), by_role) for entry in entries]
    messages = [_read_message(entry, found, key, notes) for entry, found in zip(entries, fields, strict=True)]
    roles = [read_role(entry[found.role]) for entry, found in zip(entries, fields, strict=True)]
    return _join_calls(messages, roles) if "call" in roles else tuple(messages)


def _join_calls(messages: list[Message], roles: list[str]) -> tuple[Message, ...]:
    """Joins a turn of role "call" to the assistant's turn before it: calls in a row are parallel, as in ms-swift.

    Apart, the model would learn to end its turn where the next call belongs. Raises BadRow for what one turn cannot be.
    """
    joined = list[Message]()
    for message, role in zip(messages, roles, strict=True):
        if role == "call" and joined and joined[-1].role == "assistant":
            before = joined.pop()
            if before.is_trained != message.is_trained or message.reasoning is not None:
                raise BadRow("a call that goes on with the assistant's turn has thoughts or a flag of its own")
            message = replace(before, tool_calls=before.tool_calls + message.tool_calls)
        joined.append(message)
    return tuple(joined)


def _rows_of_table(table: dict[str, Any]) -> Any:
    """The messages of an object of equally long lists, as `datasets` gives a Sequence. Another object as it is."""
    columns = list(table.values())
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return table
    return [dict(zip(table, values, strict=True)) for values in zip(*columns, strict=True)]


def are_messages(value: Any) -> bool:
    """Returns whether a value is a list of messages, and not a text or a list of its parts."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "type" not in value[0]


def _read_message(entry: dict[str, Any], fields: Fields, key: str, notes: Notes) -> Message:
    for name in fields.unread:
        notes.add_unread(f"{key}[].{name}", entry[name])
    others = {name: entry[spelt] for name, spelt in fields.others.items() if entry[spelt] is not None}
    role = read_role(readable(entry[fields.role]))
    content = entry.get(fields.content)
    if role == "call":
        return _read_call_turn(content, others, key, notes)
    if role != "assistant":
        return _read_other(role, content, others, key, notes)
    return read_answer(content, others, "the assistant's text", key, notes)


def _read_other(role: Any, content: Any, others: Mapping[str, Any], key: str, notes: Notes) -> Message:
    """A message that is not the assistant's. Only a user's must have something to see."""
    what = f"the {role}'s text"
    if isinstance(content, list) and not (parts := join_parts(content, what)).reasoning:
        _note_parts(parts.unread, key, notes)
        content = parts.text
    text = require_utf8(content, what) if role != "user" and isinstance(content, str) else require_text(content, what)
    if not others:
        return Message(role, text)
    refuse_media(others)
    if not is_nothing(others.get("tool_calls")) or not is_nothing(others.get("function_call")):
        raise BadRow(f"a turn of the {role} has tool calls, which are the assistant's")
    used: tuple[str, ...] = MEDIA_KEYS
    if role == "system":
        notes.add_tools(others.get("tools"))
        used = (*MEDIA_KEYS, "tools")
    tool_name, call_id = None, None
    if role == "tool":
        tool_name = optional_text(others.get("name"), "the tool's name")
        call_id = optional_text(others.get("tool_call_id"), "the tool's tool_call_id")
        used = (*MEDIA_KEYS, "name", "tool_call_id")
    for name, value in others.items():
        # A turn that is not the assistant's is never learnt, so a flag that says so says nothing new.
        if name not in used and not (name in LEARN_FLAGS and not says_learn(name, value)):
            notes.add_unread(f"{key}[].{name}", value)
    return Message(role, text, name=tool_name, tool_call_id=call_id)


def read_answer(content: Any, others: Mapping[str, Any], what: str, key: str, notes: Notes) -> Message:
    """A turn of the assistant: thoughts, text and calls, of which the text may be missing beside calls.

    others: what else is said of it, by the names of USED_FIELDS. what: the text's name in errors.
    """
    thoughts = ""
    if isinstance(content, list):
        parts = join_parts(content, what)
        _note_parts(parts.unread, key, notes)
        content, thoughts = parts.text, parts.reasoning
    if not others and not thoughts:
        return Message("assistant", require_text(content, what))
    refuse_media(others)
    calls, older = read_calls(others.get("tool_calls")), read_calls(others.get("function_call"))
    if calls and older and calls[0].name != older[0].name:
        raise BadRow("a turn has tool_calls and another function_call")
    calls = calls or older
    if calls and (content is None or (isinstance(content, str) and is_blank(content))):
        text = content or ""
    else:
        text = require_text(content, what)
    for name in ("name", "tool_call_id", "tools"):
        notes.add_unread(f"{key}[].{name}", others.get(name))
    return Message("assistant", text, _read_thoughts(others, thoughts), calls, is_trained=is_learnt(others))


def _read_call_turn(content: Any, others: Mapping[str, Any], key: str, notes: Notes) -> Message:
    calls = read_calls(content)
    if not calls:
        raise BadRow("a turn that calls a tool names none")
    refuse_media(others)
    for name in (*TOOL_FIELDS, "tools"):
        notes.add_unread(f"{key}[].{name}", others.get(name))
    return Message("assistant", "", _read_thoughts(others, ""), calls, is_trained=is_learnt(others))


def _read_turns(entry: dict[str, Any], pair: tuple[str, str], key: str, notes: Notes) -> list[Message]:
    """The turns of an object that has both sides': what the user says, and what the assistant answers."""
    user, assistant = pair
    names = ("system", *pair, *LEARN_FLAGS, *UNCLEAR_FLAGS, *THOUGHT_FIELDS)
    for name, value in entry.items():
        if name not in names:
            notes.add_unread(f"{key}[].{name}", value)
    others = {name: value for name, value in entry.items() if name in USED_FIELDS and value is not None}
    system = optional_text(entry.get("system"), "system")
    turns = [Message("system", system)] if system is not None else []
    turns.append(Message("user", require_text(entry.get(user), f"{key}[].{user}")))
    return [*turns, read_answer(entry.get(assistant), others, f"{key}[].{assistant}", key, notes)]


def _read_thoughts(others: Mapping[str, Any], parts: str) -> str | None:
    """The thoughts, which several fields may hold as long as they are the same. None where there are none."""
    found = [require_text(others[name], name) for name in THOUGHT_FIELDS if not is_nothing(others.get(name))]
    if len(set(found := [*found, *([parts] if not is_blank(parts) else [])])) > 1:
        raise BadRow("the assistant's thoughts are there twice, and differ")
    return require_utf8(found[0], "the assistant's thoughts") if found else None


def is_learnt(others: Mapping[str, Any]) -> bool:
    """Returns whether the flags of a row or a message let its answer be learnt. One that says no is enough."""
    for name in UNCLEAR_FLAGS:
        if not is_nothing(others.get(name)):
            refuse_unclear(name)
    flags = [says_learn(name, others[name]) for name in LEARN_FLAGS if not is_nothing(others.get(name))]
    return all(flags)


def refuse_media(others: Mapping[str, Any]) -> None:
    """Raises BadRow for pictures, sound and films."""
    for name in MEDIA_KEYS:
        if not is_nothing(others.get(name)):
            raise BadRow(f"it has {name}; only text can be trained")


def _note_parts(names: tuple[str, ...], key: str, notes: Notes) -> None:
    notes.unread.update(f"{key}[].content[].{name}" for name in names)
