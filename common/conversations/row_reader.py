"""Reads a row of any accepted format as a conversation or as plain text, and checks it.

A row that is neither raises BadRow.
"""

from collections import Counter
from typing import Any

from common.conversations.conversation import Conversation, Example, Message
from common.conversations.message_fields import ROLES
from common.conversations.messages import Notes, is_learnt, read_messages, refuse_media
from common.conversations.pairs import read_pair, untrained
from common.conversations.texts import is_nothing, optional_text, parse_cell, require_text
from common.conversations.tool_calls import read_tools
from common.sources.formats import (
    FORMAT_OF,
    LABEL_KEYS,
    SYSTEM_KEYS,
    WANTED_KEYS,
    MatchedKeys,
    match_keys,
    preference_data,
    quoted,
)
from common.sources.learn_flags import LEARN_FLAGS, UNCLEAR_FLAGS, is_flag_text
from common.sources.source_row import BadRow, NotToLearn, Row, readable

_LISTS = ("messages", "conversations", "conversation")  # keys under which all messages are
# Given to the template by its renderer, so a row cannot set them.
_RESERVED = {
    *("messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


class RowReader:
    """Reads the rows of one source. The first good row decides the format of all.

    format_name: the format, where it is known already. columns: DataSpec's. unread: how many rows had a key, or a
    message's field, that was not used, by its name: "id", "messages[].name".
    """

    def __init__(self, format_name: str = "", columns: dict[str, str] | None = None) -> None:
        self.format_name = format_name
        self.columns = columns
        self.unread: Counter[str] = Counter()

    def read(self, row: Row) -> Example:
        """Raises BadRow, which says what is wrong, when the row is not a good one.

        Raises NotToLearn where the row says that nothing of it is to be learnt, and PreferenceData where the source is
        not for these recipes.
        """
        matched = match_keys(tuple(row), self.columns)
        if matched is None:
            raise BadRow(f"no format has these keys: {quoted(row)}; a row needs {WANTED_KEYS}")
        if self.format_name and matched.format_name != self.format_name:
            raise BadRow(f"the format is {matched.format_name}, not {self.format_name} as above it")
        values, notes = list(row.values()), Notes()
        for name, place in matched.unread:
            notes.add_unread(name, values[place])
        example = _read_format(matched.format_name, _fields(matched.fields, values), notes)
        if matched.rivals:
            _refuse_rivals(matched, values, example)
        self.format_name = matched.format_name
        if notes.unread:
            self.unread.update(notes.unread)
        return example


def _fields(places: dict[str, int], values: list[Any]) -> Row:
    return {key: values[place] for key, place in places.items()}


def _read_format(format_name: str, fields: Row, notes: Notes) -> Example:
    key, *more = FORMAT_OF[format_name].keys
    if len(fields) > 1 + len(more):
        _check(fields, notes)
    if key == "text":
        if isinstance(role := fields.get("role"), str) and role.strip().lower() in ROLES:
            raise BadRow("the row is one message, a text with a role: put all messages of a conversation in one row")
        notes.add_unread("role", fields.get("role"))
        if not is_learnt(fields):
            raise NotToLearn("the row says not to learn it")
        return require_text(fields["text"], "text")
    messages = read_messages(fields[key], key, notes) if key in _LISTS else read_pair(fields, key, *more, notes=notes)
    if len(fields) == 1 and notes.tools is None:
        return Conversation(_to_learn(messages))
    messages = _with_system(messages, fields)
    if not is_learnt(fields):
        messages = untrained(messages)
    for name in ("tools", "functions"):
        notes.add_tools(fields.get(name))
    arguments = _read_template_arguments(fields.get("chat_template_kwargs"))
    return Conversation(_to_learn(messages), read_tools(notes.tools), arguments)


def _check(fields: Row, notes: Notes) -> None:
    """Refuses media and preferences. Removes flags and labels that are columns of another meaning, as unread."""
    refuse_media(fields)
    for name in LABEL_KEYS:
        label = readable(fields.pop(name, None))
        is_word = is_flag_text(label) and len(label.strip()) > 3  # true and false of a CSV file
        if isinstance(label, bool) or is_word or (name == "kto_tag" and not is_nothing(label)):
            raise preference_data(f"{name!r} is true or false, as KTO takes it")
        notes.add_unread(name, label)
    for name in (*LEARN_FLAGS, *UNCLEAR_FLAGS):
        if isinstance(fields.get(name), str) and not is_flag_text(fields[name]):
            notes.add_unread(name, fields.pop(name))


def _to_learn(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise BadRow("it has no turn of the assistant to learn")
    if not any(answer.is_trained for answer in answers):
        raise NotToLearn("the row says not to learn it")
    return messages


def _with_system(messages: tuple[Message, ...], fields: Row) -> tuple[Message, ...]:
    """The messages after the row's own system message, which may be there too as long as it is the same."""
    found = [text for key in SYSTEM_KEYS if (text := optional_text(fields.get(key), key)) is not None]
    if not found:
        return messages
    first = messages[0]
    if first.role == "system":
        found += [] if is_nothing(first.content) else [first.content]
        messages = messages[1:]
    if len({text.strip() for text in found}) > 1:
        raise BadRow("it has two system messages that differ")
    return (Message("system", found[0]), *messages)


def _read_template_arguments(value: Any) -> dict[str, Any]:
    value = parse_cell(value, "the chat_template_kwargs") if isinstance(value, str) else readable(value)
    if is_nothing(value):
        return {}
    if not isinstance(value, dict):
        raise BadRow("chat_template_kwargs are not a JSON object")
    given = {name: argument for name, argument in value.items() if argument is not None and argument not in ([], {})}
    for name, argument in given.items():
        if name in _RESERVED:
            raise BadRow(f"chat_template_kwargs cannot set {name!r}")
        if not isinstance(argument, str | int | float):
            raise BadRow(f"chat_template_kwargs has {name!r:.40}, which is not a text, a number, true or false")
    return given


def _refuse_rivals(matched: MatchedKeys, values: list[Any], example: Example) -> None:
    """Raises BadRow where another format reads the row too, and gives messages that this one does not have.

    A rival whose own values are missing or of another kind says nothing.
    """
    assert isinstance(example, Conversation)  # text has no rivals
    said = {(message.role, message.content.strip()) for message in example.messages}
    for name, places in matched.rivals.items():
        try:
            other = _read_format(name, _fields(places, values), Notes())
        except BadRow:
            continue
        assert isinstance(other, Conversation)
        if not {(m.role, m.content.strip()) for m in other.messages} <= said:
            raise BadRow(
                f"it can be read as {matched.format_name} and as {name}, which differ: say which it is, as in "
                f"DataSpec(columns={_columns_of(name)}) or DataSpec(columns={_columns_of(matched.format_name)})"
            )


def _columns_of(format_name: str) -> dict[str, str]:
    """What DataSpec.columns says to take this format."""
    keys = FORMAT_OF[format_name].keys
    return {"messages": keys[0]} if keys[0] in _LISTS else dict(zip(("user", "assistant"), keys, strict=True))
