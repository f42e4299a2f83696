"""Renders conversations with the model's chat template, and tells the messages' texts from the template's own.

A conversation is rendered twice: with placeholders in the place of its texts, and as it is. What stands between the
placeholders is the template's own text. It is kept for conversations that differ in nothing but their texts. The
real text must be the template's text with the messages put in: so what a template drops or changes is found.
"""

import inspect
import json
import re
from collections import Counter
from dataclasses import replace
from os.path import commonprefix
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from common.conversations.conversation import Conversation
from common.sources.source_row import BadRow
from common.tokens.outline import (
    Outline,
    Span,
    TextLayout,
    fill_holes,
    free_character,
    match_texts,
    move_thoughts,
    outline_of,
    text_around,
)
from common.tokens.template_messages import (
    CALL_FORMS,
    IDS_NOTE,
    PLAIN_FORM,
    CallForm,
    beside_texts,
    describe,
    prints_python,
    refuse_dropped_call,
    template_messages,
    tool_name,
)

MAX_LAYOUTS = 512  # that are kept
MAX_KEPT_MESSAGES = 100_000  # of the conversations that they are of, together: a few hundred bytes each
# What a template's code can raise on a conversation that it was not written for.
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)


class Renderer:
    """Renders conversations with the chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.template: str = tokenizer.chat_template or ""
        self.reads_reasoning = re.search(r"\b(reasoning_content|thinking)\b", self.template) is not None
        self._own_arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._layouts: dict[Any, TextLayout] = {}
        self._kept_messages = 0

    def render(self, conversation: Conversation, *, answering: bool = False) -> tuple[str, TextLayout, list[Span]]:
        """Returns the rendered text, the template's part of it, and where each text of layout.order stands.

        answering: with the generation prompt at the end. Raises BadRow when the template refuses the conversation,
        and when it drops, repeats or changes a message's text, a tool call or a tool.
        """
        conversation = self._apart(conversation)
        outline = outline_of(conversation)
        layout, form = self._find_layout(conversation, outline, answering)
        contents = [(message.content, message.reasoning or None) for message in conversation.messages]
        rendered = self._apply(conversation, contents, form, answering)
        return rendered, layout, match_texts(conversation, rendered, layout, outline.texts)

    def layout(self, conversation: Conversation, *, answering: bool = False) -> TextLayout:
        """Returns the template's own text around the messages. Raises BadRow as render does."""
        conversation = self._apart(conversation)
        return self._find_layout(conversation, outline_of(conversation), answering)[0]

    def own_text(self, conversation: Conversation) -> str:
        """Returns the template's own text in a conversation; "" where it refuses it or there is no template."""
        if not self.template:
            return ""
        try:
            return "\n".join(self.layout(conversation).pieces)
        except BadRow:
            return ""

    def _apart(self, conversation: Conversation) -> Conversation:
        """Returns it with thoughts apart that stand in an answer's text, for a template that reads them so."""
        if not self.reads_reasoning or not any("</think>" in m.content for m in conversation.messages):
            return conversation
        return replace(conversation, messages=tuple(map(move_thoughts, conversation.messages)))

    def _find_layout(
        self, conversation: Conversation, outline: Outline, answering: bool
    ) -> tuple[TextLayout, CallForm]:
        if has_tools(conversation):
            return self._lay_out_in_some_form(conversation, outline, answering)
        arguments = arguments_key(conversation.template_arguments)
        key = (tuple(m.role for m in conversation.messages), outline.messages, arguments, answering)
        if key not in self._layouts:
            if len(self._layouts) >= MAX_LAYOUTS or self._kept_messages > MAX_KEPT_MESSAGES:
                self._layouts.clear()
                self._kept_messages = 0
            self._layouts[key] = self._lay_out(conversation, outline, PLAIN_FORM, answering)
            self._kept_messages += len(conversation.messages)
        return self._layouts[key], PLAIN_FORM

    def _lay_out_in_some_form(
        self, conversation: Conversation, outline: Outline, answering: bool
    ) -> tuple[TextLayout, CallForm]:
        """Returns the layout with the first form of calls that the template takes.

        Raises BadRow, with what the template drops where it does not refuse every form.
        """
        faults = []
        for form in CALL_FORMS:
            try:
                return self._lay_out(conversation, outline, form, answering), form
            except BadRow as fault:
                faults.append(fault)
        raise next((fault for fault in faults if "refuses it" not in str(fault)), faults[0])

    def _lay_out(self, conversation: Conversation, outline: Outline, form: CallForm, answering: bool) -> TextLayout:
        tools = [tool_name(tool) for tool in conversation.tools]
        mark = free_character("".join((self.template, *beside_texts(conversation))))
        numbers = iter(range(len(outline.texts)))
        filled = []
        for content, reasoning in outline.messages:
            thoughts = None if reasoning is None else fill_holes(reasoning, mark, numbers)
            filled.append((fill_holes(content, mark, numbers), thoughts))
        rendered = self._apply(conversation, filled, form, answering)
        # split gives the texts between the placeholders, and between those texts the placeholders' numbers.
        placeholder = re.compile(f"{mark}(\\d+){mark}")
        split = placeholder.split(rendered)
        pieces, order = tuple(split[0::2]), tuple(int(number) for number in split[1::2])
        dropped = _dropped_thoughts(conversation, outline, order)
        layout = TextLayout(
            pieces,
            order,
            tuple(outline.owners[number] for number in order),
            tuple(outline.tails[number] for number in order),
            frozenset(outline.owners[number] for number in outline.thoughts) - dropped,
            frozenset(dropped),
            (IDS_NOTE,) if form.numbered_ids else (),
        )
        if tools:
            own_text = "\n".join(pieces)
            without = self._apply(replace(conversation, tools=()), filled, form, answering)
            if rendered == without or any(name not in own_text for name in tools):
                raise BadRow("the chat template drops the tools: it has no place for them")
            shared = commonprefix([rendered, without])
            layout = replace(layout, tools_at=len(placeholder.findall(shared)))
        for index, message in enumerate(conversation.messages):
            if message.tool_calls:
                text = text_around(layout, index)
                refuse_dropped_call(message, text, describe(conversation, index))
                if not form.arguments_as_text and prints_python(message, text):
                    raise BadRow("the chat template writes the arguments of a tool call as Python does, not as JSON")
        return layout

    def _apply(
        self, conversation: Conversation, texts: list[tuple[str, str | None]], form: CallForm, answering: bool
    ) -> str:
        arguments = conversation.template_arguments
        if taken := self._own_arguments & arguments.keys():
            raise BadRow(f"a chat template cannot be given an argument of this name: {min(taken)}")
        try:
            return self.tokenizer.apply_chat_template(
                template_messages(conversation, texts, form),
                tools=list(conversation.tools) or None,
                tokenize=False,
                add_generation_prompt=answering,
                **arguments,
            )
        except _TEMPLATE_FAULTS as error:
            raise BadRow(f"the chat template refuses it: {error}") from error


def arguments_key(arguments: dict[str, Any]) -> str:
    """Returns a text that is the same for the same template arguments."""
    return json.dumps(arguments, sort_keys=True, default=str)


def has_tools(conversation: Conversation) -> bool:
    """Returns whether the conversation has more than roles and texts: tools, calls, results or names."""
    return bool(conversation.tools) or any(m.tool_calls or m.role == "tool" or m.name for m in conversation.messages)


def _dropped_thoughts(conversation: Conversation, outline: Outline, order: tuple[int, ...]) -> set[int]:
    """Returns the messages whose thoughts are not rendered.

    Raises BadRow when any other text is not rendered, or one is rendered twice.
    """
    dropped, counts = set[int](), Counter(order)
    for number, owner in enumerate(outline.owners):
        if counts[number] > 1:
            raise BadRow(f"the chat template repeats {describe(conversation, owner)}")
        if not counts[number]:
            if number not in outline.thoughts:
                raise BadRow(f"the chat template drops {describe(conversation, owner)}")
            dropped.add(owner)
    return dropped
