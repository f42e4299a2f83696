"""Which part of a rendered conversation is trained: each turn of the assistant, as the model will be asked for it.

A turn begins where the generation prompt ends, and ends with the token that generation stops at. What the model cannot
be asked for in this way is not trained, and said.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any
from weakref import WeakKeyDictionary

from common.data.control_tokens import ControlTokens
from common.data.conversation import Conversation, Message, ToolCall
from common.data.outline import Layout
from common.data.rendering import Renderer, has_tools
from common.data.source_row import BadRow
from common.recipe import UserError

DROPPED_THOUGHTS = "earlier answers are not trained: the chat template drops their thoughts"
OTHER_BEGINNING = "answers are not trained that the chat template begins otherwise than its generation prompt"
OTHER_END = "earlier answers are not trained: the chat template ends them otherwise than the last one"
SWITCHED_THINKING = "answers are trained behind the prompt that enable_thinking={} gives"

_USER, _ANSWER, _SYSTEM = Message("user", "Hello"), Message("assistant", "Hi"), Message("system", "Be kind")
_CALL = Message("assistant", "", tool_calls=(ToolCall("look_up", {"word": "kind"}, "000000000"),))
_RESULT = Message("tool", "good", name="look_up", tool_call_id="000000000")
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Explains a word",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "which"}}},
    },
}
SAMPLE = Conversation((_USER, _ANSWER))
# Short conversations that end with a message of each role, the first that a template takes is asked.
_CONTEXTS = {
    "user": [(_USER,), (_SYSTEM, _USER)],
    "assistant": [(_USER, _ANSWER), (_SYSTEM, _USER, _ANSWER)],
    "tool": [(_USER, _CALL, _RESULT)],
    "system": [(_SYSTEM,), (_USER, _SYSTEM), (_USER, _ANSWER, _SYSTEM)],
}


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant that can be trained."""

    message: int
    start: tuple[int, int]  # where the generation prompt ends: number of the template's piece, and place in it
    prompt_end: str  # the generation prompt from its last control token on; "" where it has none
    prompt_control: int  # number of this control token among those of the rendered text
    end_control: int  # number of the control token that ends the turn
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turns:
    """What can be trained of a conversation, and why the rest cannot."""

    trainable: list[Turn]
    untrainable: dict[int, str]  # from the message to the note that says why
    control_count: int  # control tokens in the template's own text


class TurnFinder:
    """Finds the turns of the assistant in the layouts of one chat template."""

    def __init__(self, renderer: Renderer, control: ControlTokens) -> None:
        self.renderer, self.control = renderer, control
        self._prompts: dict[tuple[str, bool, str], str | None] = {}
        self._headers: dict[tuple[bool, str], str] = {}
        self._found = WeakKeyDictionary[Layout, Turns]()  # layouts are kept for conversations of the same form
        self._closing: str | None = None
        self._call_end: str | None = None

    def find(self, conversation: Conversation, layout: Layout) -> Turns:
        """Returns the turns of the assistant. Raises UserError when no control token ends a turn."""
        if layout not in self._found:
            self._found[layout] = self._find(conversation, layout)
        return self._found[layout]

    def _find(self, conversation: Conversation, layout: Layout) -> Turns:
        first_controls = [0]  # number of the first control token in each piece
        for piece in layout.pieces:
            first_controls.append(first_controls[-1] + self.control.count(piece))
        places = dict[int, list[int]]()  # of a message's texts in the layout
        for place, owner in enumerate(layout.owners):
            places.setdefault(owner, []).append(place)
        turns = Turns([], {}, first_controls[-1])
        with_tools = has_tools(conversation)
        place = (0, 0)  # behind the message before: number of the piece, and place in it
        for index, message in enumerate(conversation.messages):
            own = places.get(index, [])
            behind = (own[-1] + 1, 0) if own else place
            if message.role == "assistant":
                begin = (own[0], 0) if own and own[0] != place[0] else place
                turn = self._find_turn(conversation, layout, index, begin, behind if own else None, with_tools)
                if isinstance(turn, str):
                    turns.untrainable[index] = turn
                else:
                    (start, prompt, notes), end = turn
                    prompt_end = self.control.from_last(prompt)
                    head = layout.pieces[start[0]][: start[1] - len(prompt_end)]
                    upto = layout.pieces[end[0]][: end[1]]
                    prompt_control = first_controls[start[0]] + self.control.count(head)
                    end_control = first_controls[end[0]] + self.control.count(upto) - 1
                    turns.trainable.append(Turn(index, start, prompt_end, prompt_control, end_control, notes))
                    if message.tool_calls:
                        behind = end
            place = behind
        return turns

    def _find_turn(
        self,
        conversation: Conversation,
        layout: Layout,
        index: int,
        begin: tuple[int, int],
        behind: tuple[int, int] | None,
        with_tools: bool,
    ) -> tuple[tuple[tuple[int, int], str, tuple[str, ...]], tuple[int, int]] | str:
        """Returns start and end of the assistant's turn, or the note that says why it cannot be trained.

        begin: from where on it is searched. behind: where its text ends; None where it has none.
        """
        if index in layout.thoughts_dropped:
            return DROPPED_THOUGHTS
        if (start := self._find_start(conversation, layout, index, begin, with_tools)) is None:
            return OTHER_BEGINNING
        end = self._find_end(conversation.messages[index], layout, behind or start[0], behind is not None)
        return OTHER_END if end is None else (start, end)

    def _find_start(
        self, conversation: Conversation, layout: Layout, index: int, begin: tuple[int, int], with_tools: bool
    ) -> tuple[tuple[int, int], str, tuple[str, ...]] | None:
        """Returns where the generation prompt ends, the prompt, and notes; None where it does not stand there."""
        piece, position = begin
        text = layout.pieces[piece]
        if piece and layout.owners[piece - 1] > index:
            return None  # Gemma 4's template moves what is said beside a call behind the call's result
        previous = conversation.messages[index - 1] if index else None
        # The message before has its text directly before this piece, unless the template moved it or it has none.
        follows_text = position == 0 and piece > 0
        if follows_text and (previous is None or layout.owners[piece - 1] != index - 1):
            if previous is None or index - 1 in layout.owners:
                previous = conversation.messages[layout.owners[piece - 1]]
            else:
                follows_text = False
        if previous is not None and previous.tool_calls:
            follows_text = False  # the call stands between
        has_thoughts = index in layout.thoughts_shown
        for arguments, notes in self._arguments(conversation, has_thoughts):
            alone = self._header(arguments, with_tools)
            prompt = alone
            if previous is not None and not previous.tool_calls:
                prompt = self._prompt(previous.role, arguments, with_tools)
            if follows_text:
                for skipped in _left_of(layout.tails[piece - 1]):
                    if prompt is not None and text.startswith(skipped + prompt):
                        return (piece, len(skipped + prompt)), prompt, notes
                continue
            for wanted in (prompt, alone):
                if wanted and (found := text.find(wanted, position)) >= 0:
                    return (piece, found + len(wanted)), wanted, notes
        return None

    def prompts(self, role: str, conversation: Conversation) -> list[str]:
        """Returns what may stand between a message of this role and the answer that is asked for."""
        both = [arguments for thoughts in (True, False) for arguments, _ in self._arguments(conversation, thoughts)]
        found = [self._prompt(role, arguments, has_tools(conversation)) for arguments in both]
        return sorted({prompt for prompt in found if prompt}, key=len, reverse=True)

    def _arguments(
        self, conversation: Conversation, has_thoughts: bool
    ) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
        """Yields the conversation's own template arguments, and those that ask for thoughts as the answer has them."""
        own = conversation.template_arguments
        yield own, ()
        if "enable_thinking" in self.renderer.template and "enable_thinking" not in own:
            yield own | {"enable_thinking": has_thoughts}, (SWITCHED_THINKING.format(has_thoughts),)

    def _prompt(self, role: str, arguments: dict[str, Any], with_tools: bool) -> str | None:
        """Returns what the template writes after a message of this role to ask for an answer; None where it cannot."""
        key = (role, with_tools, json.dumps(arguments, sort_keys=True, default=str))
        if key not in self._prompts:
            self._prompts[key] = None
            for context in _CONTEXTS[role]:
                asked = Conversation(context, (_TOOL,) if with_tools else (), arguments)
                try:
                    layout = self.renderer.layout(asked, answering=True)
                except BadRow:
                    if with_tools:  # the template may take calls and no tools
                        try:
                            layout = self.renderer.layout(replace(asked, tools=()), answering=True)
                        except BadRow:
                            continue
                    else:
                        continue
                if layout.owners and layout.owners[-1] == len(context) - 1:
                    self._prompts[key] = layout.pieces[-1]
                    break
        return self._prompts[key]

    def _header(self, arguments: dict[str, Any], with_tools: bool) -> str:
        """Returns what add_generation_prompt adds to a conversation; "" where that is nothing."""
        key = (with_tools, json.dumps(arguments, sort_keys=True, default=str))
        if key not in self._headers:
            self._headers[key] = self._find_header(arguments, with_tools)
        return self._headers[key]

    def _find_header(self, arguments: dict[str, Any], with_tools: bool) -> str:
        asked = self._prompt("user", arguments, with_tools)
        try:
            closed = self.renderer.layout(Conversation((_USER,), (), arguments)).pieces[-1]
        except BadRow:
            return ""
        if asked is None:
            return ""
        shared = len(commonprefix([asked, closed]))
        torn = (token.start() for token in self.control.finditer(asked, 0) if token.start() < shared < token.end())
        return asked[next(torn, shared) :]

    def sample(self) -> Conversation:
        """Returns a conversation of one question and its answer. Raises BadRow when the template refuses it."""
        try:
            self.renderer.layout(SAMPLE)
        except BadRow:
            with_system = Conversation((_SYSTEM, *SAMPLE.messages))
            if not self.renderer.own_text(with_system):
                raise
            return with_system
        return SAMPLE

    def closing(self) -> str:
        """Returns what the template writes after an answer, up to the token that ends the turn.

        Raises UserError when there is no such token.
        """
        if self._closing is None:
            layout = self.renderer.layout(self.sample())
            closing = self.control.up_to_end(layout.pieces[-1])
            if closing is None or self.control.last(closing) in self._header({}, False):  # a template may always ask
                raise UserError(
                    "the chat template ends the assistant's turn without a control token: nothing would stop it"
                )
            self._closing = closing
        return self._closing

    def call_end(self) -> str | None:
        """Returns the control token that ends a turn with a call of a tool; None where the template has no calls."""
        if self._call_end is None:
            self._call_end = ""
            try:
                layout = self.renderer.layout(Conversation((_USER, _CALL)))
            except BadRow:
                return None
            end = self.control.last(self.closing())
            call = layout.pieces[-1].removeprefix(self._prompt("user", {}, False) or "").rstrip()
            self._call_end = end if end in call else self.control.at_end(call) or ""
        return self._call_end or None

    def _find_end(
        self, message: Message, layout: Layout, after: tuple[int, int], has_text: bool
    ) -> tuple[int, int] | None:
        """Returns where the token ends that ends the turn, as piece and place in it; None where there is none.

        after: where its text ends, or where it begins when it has none.
        """
        piece, position = after
        text = layout.pieces[piece]
        try:
            closing = self.closing()
        except (UserError, BadRow):  # which is for those to say who want to train
            return None
        if message.tool_calls:
            ends = {self.control.last(closing), self.call_end()}
            found = next((m for m in self.control.finditer(text, position) if m[0] in ends), None)
            return None if found is None else (piece, found.end())
        for skipped in _left_of(layout.tails[piece - 1] if has_text else ""):
            if text.startswith(skipped, position):
                start = position + len(skipped)
                blanks = len(text) - start - len(text[start:].lstrip())
                for place, wanted in ((start, closing), (start + blanks, closing.lstrip())):
                    if text.startswith(wanted, place):
                        return piece, place + len(wanted)
        return None


def _left_of(tail: str) -> list[str]:
    """Returns what a template may leave of the blanks and tags behind a text, the longest first."""
    return [tail[:length] for length in range(len(tail), -1, -1)]
