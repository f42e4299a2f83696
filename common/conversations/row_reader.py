"""Reads a row of any accepted format as a conversation, as plain text or as answers that are better and worse.

A row that is none of them raises BadRow.
"""

from collections import Counter
from typing import Any

from common.conversations.conversation import AnyExample, Conversation, Message, Preference
from common.conversations.message_fields import ROLES
from common.conversations.messages import Notes, is_learnt, read_messages, refuse_media
from common.conversations.pairs import read_pair, untrained
from common.conversations.preferences import read_rating, read_two_answers, to_preference, to_rated
from common.conversations.texts import is_nothing, optional_text, parse_cell, require_text
from common.conversations.tool_calls import read_tools
from common.recipe import Kind
from common.sources.formats import (
    FORMAT_OF,
    LABEL_KEYS,
    SYSTEM_KEYS,
    WANTED_KEYS,
    MatchedKeys,
    match_keys,
    quoted,
)
from common.sources.learn_flags import LEARN_FLAGS, UNCLEAR_FLAGS, is_flag_text
from common.sources.other_kind import has_rating
from common.sources.source_row import BadRow, NotToLearn, OtherKind, Row, readable

_LISTS = ("messages", "conversations", "conversation")  # keys under which all messages are
# Given to the template by its renderer, so a row cannot set them.
_RESERVED = {
    *("messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


class RowReader:
    """Reads the rows of one source. The first good row decides the format of all.

    format_name: the format, where it is known already. columns and kind: DataSpec's; kind None reads any, each row as
    what it is. unread: how many rows had a key, or a message's field, that was not used, by its name: "id",
    "messages[].name".
    """

    def __init__(
        self,
        format_name: str = "",
        columns: dict[str, str] | None = None,
        kind: Kind | None = "conversations",
    ) -> None:
        self.format_name = format_name
        self.columns, self.kind = columns, kind
        self.unread: Counter[str] = Counter()

    def read(self, row: Row) -> AnyExample:
        """Raises BadRow, which says what is wrong, when the row is not a good one.

        Raises NotToLearn where the row says that nothing of it is to be learnt, and OtherKind where the source is for
        another kind of recipe.
        """
        matched = self._match(row)
        if matched is None:
            raise BadRow(f"no format has these keys: {quoted(row)}; a row needs {WANTED_KEYS[self.kind]}")
        if self.format_name and matched.format_name != self.format_name:
            raise BadRow(f"the format is {matched.format_name}, not {self.format_name} as above it")
        values, notes = list(row.values()), Notes()
        for name, place in matched.unread:
            notes.add_unread(name, values[place])
        example = _read_format(matched.format_name, _fields(matched.fields, values), notes, self.kind)
        if matched.rivals:
            _refuse_rivals(matched, values, example, self.kind)
        self.format_name = matched.format_name
        if notes.unread:
            self.unread.update(notes.unread)
        return example

    def _match(self, row: Row) -> MatchedKeys | None:
        try:
            return match_keys(tuple(row), self.columns, self.kind)
        except OtherKind:
            if self.kind == "conversations" or not self.format_name:
                raise  # of pairs in a file of conversations, each one would be learnt
            what = "pair of a better and a worse answer" if self.kind == "pairs" else "single answer with a label"
            raise BadRow(f"it is no {what}, as the rows above it are") from None


def _fields(places: dict[str, int], values: list[Any]) -> Row:
    return {key: values[place] for key, place in places.items()}


def _read_format(format_name: str, fields: Row, notes: Notes, kind: Kind | None) -> AnyExample:
    known = FORMAT_OF[format_name]
    if known.is_pair:
        return _read_two_answers(fields, known.keys, notes)
    key, *more = known.keys
    rating = None
    if len(fields) > 1 + len(more):
        refuse_media(fields)
        rating = _read_label(fields, notes, kind)
        _leave_out_other_flags(fields, notes)
    elif kind == "rated":
        read_rating(fields)
    if key == "text":
        if isinstance(role := fields.get("role"), str) and role.strip().lower() in ROLES:
            raise BadRow("the row is one message, a text with a role: put all messages of a conversation in one row")
        notes.add_unread("role", fields.get("role"))
        if not is_learnt(fields):
            raise NotToLearn("the row says not to learn it")
        return require_text(fields["text"], "text")
    answer_from = None
    if key in _LISTS:
        messages = read_messages(fields[key], key, notes)
    else:
        messages, answer_from = read_pair(fields, key, *more, notes=notes)
    if len(fields) == 1 and notes.tools is None and rating is None:
        return Conversation(_to_learn(messages))
    whole = _with_rest(messages, fields, notes)
    if rating is None:
        return Conversation(_to_learn(whole.messages), whole.tools, whole.template_arguments)
    if answer_from is not None:
        answer_from += len(whole.messages) - len(messages)  # the row's own system message before them
    rated = to_rated(whole, answer_from, is_good=rating)
    _to_learn(rated.conversations[0].messages)
    return rated


def _read_two_answers(fields: Row, keys: tuple[str, ...], notes: Notes) -> Preference:
    refuse_media(fields)
    _leave_out_other_flags(fields, notes)
    if not is_learnt(fields):
        raise NotToLearn("the row says not to learn it")
    chosen, rejected = read_two_answers(fields, keys, notes)
    return to_preference(*(_with_rest(messages, fields, notes) for messages in (chosen, rejected)))


def _with_rest(messages: tuple[Message, ...], fields: Row, notes: Notes) -> Conversation:
    """The messages with the row's own system message, flags, tools and template arguments."""
    messages = _with_system(messages, fields)
    if not is_learnt(fields):
        messages = untrained(messages)
    for name in ("tools", "functions"):
        notes.add_tools(fields.get(name))
    arguments = _read_template_arguments(fields.get("chat_template_kwargs"))
    return Conversation(messages, read_tools(notes.tools), arguments)


def _read_label(fields: Row, notes: Notes, kind: Kind | None) -> bool | None:
    """Removes the labels from the fields. Returns whether they call the answer good; None for no rating.

    Of a recipe that learns from conversations, raises OtherKind for a rating; other labels are columns of another
    meaning, as unread.
    """
    if kind == "rated":
        rating = read_rating(fields)
        for name in LABEL_KEYS:
            fields.pop(name, None)
        return rating
    found = {name: readable(fields.pop(name)) for name in LABEL_KEYS if name in fields}
    for name, label in found.items():
        is_word = is_flag_text(label) and len(label.strip()) > 3  # true and false of a CSV file
        if isinstance(label, bool) or is_word or (name == "kto_tag" and not is_nothing(label)):
            if kind is None:
                return read_rating(found)
            raise has_rating(name)
        notes.add_unread(name, label)
    return None


def _leave_out_other_flags(fields: Row, notes: Notes) -> None:
    """Removes flags that are columns of another meaning, as unread."""
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


def _refuse_rivals(matched: MatchedKeys, values: list[Any], example: AnyExample, kind: Kind | None) -> None:
    """Raises BadRow where another format reads the row too, and gives messages that this one does not have.

    A rival whose own values are missing or of another kind says nothing.
    """
    said = {(message.role, message.content.strip()) for message in _messages_of(example)}
    for name, places in matched.rivals.items():
        try:
            other = _read_format(name, _fields(places, values), Notes(), kind)
        except BadRow:
            continue
        if not {(message.role, message.content.strip()) for message in _messages_of(other)} <= said:
            raise BadRow(
                f"it can be read as {matched.format_name} and as {name}, which differ: say which it is, as in "
                f"DataSpec(columns={_columns_of(name)}) or DataSpec(columns={_columns_of(matched.format_name)})"
            )


def _messages_of(example: AnyExample) -> list[Message]:
    assert not isinstance(example, str)  # text has no rivals
    conversations = [example] if isinstance(example, Conversation) else example.conversations
    return [message for conversation in conversations for message in conversation.messages]


def _columns_of(format_name: str) -> dict[str, str]:
    """What DataSpec.columns says to take this format."""
    keys = FORMAT_OF[format_name].keys
    first = {"messages": keys[0]} if keys[0] in _LISTS else {"user": keys[0]}
    if FORMAT_OF[format_name].is_pair:
        return {**(first if len(keys) > 2 else {}), "chosen": keys[-2], "rejected": keys[-1]}
    return {**first, **({"assistant": keys[1]} if len(keys) > 1 else {})}
