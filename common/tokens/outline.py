"""Conversations without their texts: what chat templates are rendered with to find the template's own text.

In an outline a hole stands for each text. Blanks at a text's edges stay in the outline, and so do the tags that
templates look for: then a template strips, splits and moves the outline exactly as it does the conversation.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from common.conversations.conversation import Conversation, Message
from common.sources.source_row import BadRow
from common.tokens.template_messages import describe

HOLE = "\ue000"  # in an outline, which holds nothing but blanks and tags beside it
# A text with <think> in it is split by Qwen3's template; <tool_response> makes it take a user's turn for a tool's.
# Mistral's writes a tool's result with quotes around it, unless it is JSON: brackets at both ends, a number, a word.
_TAGS = {
    "assistant": re.compile("(</?think>)"),
    "user": re.compile("(</?tool_response>)"),
    "tool": re.compile(r"(^\s*(?:[\[{]|(?:true|false|null|-?[\d.]+)(?=\s*$))|[\]}]\s*$)"),
}
_INLINE_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)

Span = tuple[int, int]  # start and end of a piece of text, in characters


@dataclass(frozen=True)
class Outline:
    """A conversation without its texts."""

    messages: tuple[tuple[str, str | None], ...]  # content and thoughts of each message, a hole for each text
    texts: list[str]  # what fills the holes, without blanks at the edges
    owners: list[int]  # the message of each text
    tails: list[str]  # blanks and tags that follow each text in its part of the message
    thoughts: frozenset[int]  # numbers of the texts that are thoughts


@dataclass(frozen=True, eq=False)
class TextLayout:
    """The template's own text around the texts of a conversation."""

    pieces: tuple[str, ...]  # pieces[i] stands before the i-th text of the rendered conversation; the last follows all
    order: tuple[int, ...]  # number of the i-th text of the rendered conversation: a template may move some
    owners: tuple[int, ...]  # the message that it belongs to
    tails: tuple[str, ...]  # what follows it in its message, which the template may have stripped
    thoughts_shown: frozenset[int]  # messages whose thoughts the template writes
    thoughts_dropped: frozenset[int]
    notes: tuple[str, ...]
    tools_at: int = 0  # number of the piece in which the definitions of tools begin

    @cached_property
    def places(self) -> dict[int, int]:
        """From each message with a text to the place of its last one in the order."""
        return {owner: place for place, owner in enumerate(self.owners)}

    @cached_property
    def sorted_owners(self) -> list[int]:
        return sorted(self.places)


def outline_of(conversation: Conversation) -> Outline:
    """Returns the conversation's outline and its texts."""
    outline = Outline((), [], [], [], frozenset())
    messages, thoughts = [], set[int]()
    for index, message in enumerate(conversation.messages):
        reasoning = None
        first = len(outline.texts)
        if message.reasoning:
            reasoning = _cut_out(message.reasoning, None, index, outline)
            thoughts |= set(range(first, len(outline.texts)))
        first = len(outline.texts)
        content = _cut_out(message.content, _TAGS.get(message.role), index, outline)
        if "</think>" in content:  # what stands before it are thoughts
            thoughts |= set(range(first, first + content[: content.rindex("</think>")].count(HOLE)))
        messages.append((content, reasoning))
    return replace(outline, messages=tuple(messages), thoughts=frozenset(thoughts))


def _cut_out(text: str, tags: re.Pattern[str] | None, index: int, outline: Outline) -> str:
    """Returns the text with a hole for each part of it that says something, and adds these parts to the outline."""
    parts = tags.split(text) if tags is not None else [text]
    cut, first = "", len(outline.texts)
    for number, part in enumerate(parts):
        core = part.strip()
        if number % 2 or not core:  # a tag, or blanks alone
            cut += part
            continue
        start = part.index(core)
        cut += part[:start] + HOLE + part[start + len(core) :]
        outline.texts.append(core)
        outline.owners.append(index)
    outline.tails.extend(cut.split(HOLE)[1:] if len(outline.texts) > first else [])
    return cut


def fill_holes(cut: str, mark: str, numbers: Iterator[int]) -> str:
    """Returns a placeholder, a number between two marks, in the place of each hole."""
    head, *others = cut.split(HOLE)
    return head + "".join(f"{mark}{next(numbers)}{mark}{other}" for other in others)


def move_thoughts(message: Message) -> Message:
    """Returns the message with thoughts that stand as <think>...</think> before its text in their own field."""
    if message.role != "assistant" or message.reasoning is not None:
        return message
    if (match := _INLINE_THOUGHTS.fullmatch(message.content)) is None:
        return message
    return replace(message, reasoning=match[1].strip("\n"), content=match[2])


def free_character(text: str) -> str:
    """Returns a private-use character that is not in the text."""
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)


def match_texts(conversation: Conversation, rendered: str, layout: TextLayout, texts: list[str]) -> list[Span]:
    """Returns where each text of the layout stands in the rendered conversation.

    Raises BadRow when it is not the template's own text with the messages put in, as they are or as JSON writes them.
    """
    spans, position, owner = list[Span](), 0, 0
    for piece, number, following in zip(layout.pieces, layout.order, layout.owners, strict=False):
        if not rendered.startswith(piece, position):
            break
        position, owner = position + len(piece), following
        text = texts[number]
        if not rendered.startswith(text, position):
            text = json.dumps(text, ensure_ascii=False)[1:-1]  # Llama 3.1's template writes a tool's result so
            if not rendered.startswith(text, position):
                break
        spans.append((position, position + len(text)))
        position += len(text)
    if len(spans) < len(layout.order) or rendered[position:] != layout.pieces[-1]:
        raise BadRow(f"the chat template changes the text of {describe(conversation, owner)}")
    return spans


def text_around(layout: TextLayout, index: int) -> str:
    """Returns the template's own text around a message: from the text before it to the text after it."""
    places, owners = layout.places, layout.sorted_owners
    earlier, later = bisect_left(owners, index), bisect_right(owners, index)
    before = 1 + places[owners[earlier - 1]] if earlier else 0
    after = places[owners[later]] if later < len(owners) else len(layout.owners)
    if before > after:  # a system message that the template moved stands behind it
        before = 0
    return "\n".join(layout.pieces[before : after + 1])
