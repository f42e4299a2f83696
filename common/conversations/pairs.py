"""Reads a row that has the two sides under keys of their own: what the user says, and what the assistant answers."""

import re
from dataclasses import replace

from common.conversations.conversation import Message
from common.conversations.messages import Notes, are_messages, read_answer, read_messages
from common.conversations.texts import is_nothing, optional_text, parse_cell, require_text
from common.sources.formats import REASONING_KEYS
from common.sources.source_row import BadRow, Row, readable

_THOUGHTS_OF_ROW = (*REASONING_KEYS, "reasoning")  # the latter where DataSpec.columns names it
_ABOUT = ("input", "context")  # what an instruction or a question is about
# A list of messages as JSON, or as Python prints it: what becomes of one in a CSV file
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


def read_pair(fields: Row, user: str, assistant: str, *, notes: Notes) -> tuple[tuple[Message, ...], int]:
    """A row that has the two sides under keys of their own: its messages, and how many of them are before the answer.

    Of a prompt that is messages, no answer is learnt.
    """
    for key in (user, assistant):
        refuse_messages_as_text(fields[key], key)
    before = read_history(fields.get("history"))
    if are_messages(fields[user]):
        prompt = untrained(read_messages(fields[user], user, notes))
        for key in _ABOUT:
            notes.add_unread(key, fields.get(key) if key != user else None)
    else:
        prompt = (Message("user", user_text(fields, user)),)
    if are_messages(fields[assistant]):
        answer = read_messages(fields[assistant], assistant, notes)
        if all(message.role != "assistant" for message in answer):
            raise BadRow("it has no turn of the assistant to learn")
        for key in _THOUGHTS_OF_ROW:
            notes.add_unread(key, fields.get(key))
    else:
        thoughts = {key: fields[key] for key in _THOUGHTS_OF_ROW if not is_nothing(fields.get(key))}
        answer = (read_answer(fields[assistant], thoughts, assistant, assistant, notes),)
    return (*before, *prompt, *answer), len(before) + len(prompt)


def refuse_messages_as_text(value: object, key: str) -> None:
    if isinstance(value, str) and MESSAGES_AS_TEXT.match(value):
        raise BadRow(
            f"{key} is a text that holds a list of messages: give the list itself, in a .jsonl file; where it is "
            "meant as text, make it the content of a message"
        )


def user_text(fields: Row, key: str) -> str:
    """The user's text, and after an empty line what it is about. An instruction may be left empty beside that."""
    about = [text for name in _ABOUT if name != key and (text := optional_text(fields.get(name), name))]
    if len(about) > 1:
        raise BadRow("it has both input and context; leave one")
    if about and key == "instruction" and is_nothing(fields[key]):
        return about[0]
    return "\n\n".join([require_text(fields[key], key), *about])


def read_history(value: object) -> tuple[Message, ...]:
    """Earlier turns, as pairs of a question and its answer. The answers are learnt, as in LLaMA-Factory."""
    value = parse_cell(value, "the turns of the history") if isinstance(value, str) else readable(value)
    if is_nothing(value):
        return ()
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise BadRow("the history is not a list of pairs, a question and its answer")
    turns: list[Message] = []
    for question, answer in value:
        turns.append(Message("user", require_text(question, "the user's text in the history")))
        turns.append(Message("assistant", require_text(answer, "the assistant's text in the history")))
    return tuple(turns)


def untrained(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(replace(m, is_trained=False) if m.role == "assistant" else m for m in messages)
