"""Reads better and worse answers to the same prompt, in the shapes of TRL, ms-swift, OpenAI and others, and ratings."""

from dataclasses import replace
from itertools import takewhile

from common.conversations.conversation import Conversation, Message, Preference
from common.conversations.messages import Notes, are_messages, read_answer, read_messages
from common.conversations.pairs import MESSAGES_AS_TEXT, read_history, refuse_messages_as_text, untrained, user_text
from common.conversations.texts import is_nothing
from common.sources.formats import LABEL_KEYS
from common.sources.learn_flags import is_flag_text
from common.sources.source_row import BadRow, Row, readable


def read_two_answers(
    fields: Row, keys: tuple[str, ...], notes: Notes
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Returns two conversations: one with the better answer, one with the worse one. Raises BadRow.

    keys: of the format; the last two are those of the answers, and a third one before them is the prompt's. Without it
    the better answer is a whole conversation; the worse one is another, or what it has in place of the last answer.
    """
    *of_prompt, better, worse = keys
    if not of_prompt:
        chosen = _read_whole(fields, better, notes)
        if worse != "rejected_response":
            return chosen, _read_whole(fields, worse, notes)
        rejected = _read_side(fields, worse, notes)
        return chosen, rejected if _is_whole(rejected) else (*_before_last_answer(chosen), *rejected)
    prompt, is_text = _read_prompt(fields, of_prompt[0], notes)
    sides = [_read_side(fields, key, notes) for key in (better, worse)]
    if any(map(_is_whole, sides)):
        notes.add_unread("history", fields.get("history"))
        for side, key in zip(sides, (better, worse), strict=True):
            _refuse_other_prompt(prompt, side, key, is_text=is_text)
        return sides[0], sides[1]
    if prompt[-1].role == "assistant":
        raise BadRow(
            f"{of_prompt[0]} ends with an answer, and {better} and {worse} are two more: it ends with a question"
        )
    before = (*read_history(fields.get("history")), *prompt)
    return (*before, *sides[0]), (*before, *sides[1])


def to_preference(chosen: Conversation, rejected: Conversation) -> Preference:
    """The two conversations with their common beginning as the prompt, of which nothing is learnt. Raises BadRow."""
    first, second = untrained(chosen.messages), untrained(rejected.messages)
    least = min(len(first), len(second))
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), least)
    if shared == len(first) == len(second):
        raise BadRow("its two answers are the same")
    if shared == least:
        raise BadRow("one of its two conversations goes on where the other one ends")
    if others := {first[shared].role, second[shared].role} - {"assistant"}:
        raise BadRow(f"its two answers have different prompts: they differ in a turn of the {min(others)}")
    if all(message.role == "system" for message in first[:shared]):
        raise BadRow("no question stands before its two answers")
    for message in (*chosen.messages[shared:], *rejected.messages[shared:]):
        if message.role == "assistant" and not message.is_trained:
            raise BadRow("one of its two answers is marked as not to be learnt; a pair needs both: remove the mark")
    sides = [replace(side, messages=(*first[:shared], *side.messages[shared:])) for side in (chosen, rejected)]
    return Preference((sides[0], sides[1]), (1, -1))


def to_rated(conversation: Conversation, answer_from: int | None, *, is_good: bool) -> Preference:
    """The conversation with its last answer as the rated one: all turns of the assistant behind the last user's.

    answer_from: the place where the answer begins, where the row says it.
    """
    messages = conversation.messages
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=0)
    if answer_from is None:
        answer_from = max((i + 1 for i, message in enumerate(messages[:last]) if message.role == "user"), default=last)
    rated = (*untrained(messages[:answer_from]), *messages[answer_from:])
    return Preference((replace(conversation, messages=rated),), (1 if is_good else -1,))


def read_rating(fields: Row) -> bool:
    """Whether the row's label says that its answer is a good one. Raises BadRow where it says neither."""
    found = {name: readable(fields[name]) for name in LABEL_KEYS if not is_nothing(fields.get(name))}
    if not found:
        raise BadRow("its label is missing: true for a good answer, false for a bad one")
    ratings = set()
    for name, label in found.items():
        if is_flag_text(label):
            label = label.strip().lower() in ("true", "1", "1.0")
        if not isinstance(label, bool | int | float) or label not in (0, 1):
            raise BadRow(f"{name!r} is {label!r:.40}; true is for a good answer, false for a bad one")
        ratings.add(bool(label))
    if len(ratings) > 1:
        raise BadRow("its label and its kto_tag differ; leave one")
    return ratings.pop()


def _read_prompt(fields: Row, key: str, notes: Notes) -> tuple[tuple[Message, ...], bool]:
    """The messages of the prompt, and whether they are a text in the row."""
    value = fields[key]
    if isinstance(value, dict) and "messages" in value:  # OpenAI's input
        for name in sorted(value.keys() - {"messages", "tools"}):
            notes.add_unread(f"{key}.{name}", value[name])
        notes.add_tools(value.get("tools"))
        value = value["messages"]
    if key in ("messages", "conversations", "conversation") or are_messages(value):
        for name in ("input", "context"):
            notes.add_unread(name, fields.get(name) if name != key else None)
        return read_messages(value, key, notes), False
    return (Message("user", user_text(fields, key)),), True


def _read_side(fields: Row, key: str, notes: Notes) -> tuple[Message, ...]:
    """An answer: a text, a message, or a list of messages, which may be a whole conversation."""
    value = fields[key]
    refuse_messages_as_text(value, key)
    if isinstance(value, dict):
        is_table = any(isinstance(column, list) for column in value.values())
        return read_messages(value if is_table else [value], key, notes)
    return read_messages(value, key, notes) if are_messages(value) else (read_answer(value, {}, key, key, notes),)


def _read_whole(fields: Row, key: str, notes: Notes) -> tuple[Message, ...]:
    value = fields[key]
    if isinstance(value, str) and not MESSAGES_AS_TEXT.match(value):
        raise BadRow(f"{key} is a text, and there is no prompt: add the prompt, or write it as a list of messages")
    return read_messages(value, key, notes)


def _is_whole(side: tuple[Message, ...]) -> bool:
    """Whether it is a conversation, and not what follows a prompt."""
    return side[0].role != "assistant"


def _before_last_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return messages[: max((i for i, message in enumerate(messages) if message.role == "assistant"), default=0)]


def _refuse_other_prompt(prompt: tuple[Message, ...], side: tuple[Message, ...], key: str, *, is_text: bool) -> None:
    """Raises BadRow unless a whole conversation says the prompt too, which stands in the row a second time then."""
    if is_text:
        is_there = any(m.role == "user" and m.content.strip() == prompt[0].content.strip() for m in side)
    else:
        first = 0 if prompt[0].role == "system" else sum(1 for _ in takewhile(lambda m: m.role == "system", side))
        is_there = untrained(side[first : first + len(prompt)]) == untrained(prompt)
    if not is_there:
        raise BadRow(
            f"its prompt is none of the turns of {key}: leave it out, as with DataSpec(columns={{'chosen': 'chosen', "
            "'rejected': 'rejected'}), or give the answers alone"
        )
