"""What a chat template writes around an answer: how it asks for one, and how it ends. Short conversations show it."""

from collections.abc import Iterator
from contextlib import suppress
from os.path import commonprefix
from typing import Any

from common.conversations.conversation import Conversation, Message, ToolCall
from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.control_tokens import ControlTokens
from common.tokens.outline import TextLayout
from common.tokens.rendering import Renderer, arguments_key, has_tools

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
_CONTEXTS: dict[str, list[tuple[Message, ...]]] = {
    "user": [(_USER,), (_SYSTEM, _USER)],
    "assistant": [(_USER, _ANSWER), (_SYSTEM, _USER, _ANSWER)],
    "tool": [(_USER, _CALL, _RESULT)],
    "system": [(_SYSTEM,), (_USER, _SYSTEM), (_USER, _ANSWER, _SYSTEM)],
}


class TemplateSamples:
    """Asks one chat template for the text around an answer. What it wrote once is kept."""

    def __init__(self, renderer: Renderer, control: ControlTokens) -> None:
        self.renderer, self.control = renderer, control
        self._prompts: dict[tuple[str, bool, str], str | None] = {}
        self._headers: dict[tuple[bool, str], str] = {}
        self._closing: str | None = None
        self._call_end: str | None = None

    def prompts(self, role: str, conversation: Conversation) -> list[str]:
        """Returns what may stand between a message of this role and the answer that is asked for."""
        both = [arguments for thoughts in (True, False) for arguments, _ in self.arguments(conversation, thoughts)]
        found = [self.prompt(role, arguments, has_tools(conversation)) for arguments in both]
        return sorted({prompt for prompt in found if prompt}, key=len, reverse=True)

    def arguments(
        self, conversation: Conversation, has_thoughts: bool
    ) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
        """Yields the conversation's own template arguments, and those that ask for thoughts as the answer has them."""
        own = conversation.template_arguments
        yield own, ()
        if "enable_thinking" in self.renderer.template and "enable_thinking" not in own:
            yield own | {"enable_thinking": has_thoughts}, (SWITCHED_THINKING.format(has_thoughts),)

    def prompt(self, role: str, arguments: dict[str, Any], with_tools: bool) -> str | None:
        """Returns what the template writes after a message of this role to ask for an answer; None where it cannot."""
        key = (role, with_tools, arguments_key(arguments))
        if key not in self._prompts:
            self._prompts[key] = None
            for context in _CONTEXTS[role]:
                layout = self._lay_out_prompt(context, arguments, with_tools)
                if layout is not None and layout.owners and layout.owners[-1] == len(context) - 1:
                    self._prompts[key] = _after_names(layout.pieces[-1]) if role == "tool" else layout.pieces[-1]
                    break
        return self._prompts[key]

    def _lay_out_prompt(
        self, context: tuple[Message, ...], arguments: dict[str, Any], with_tools: bool
    ) -> TextLayout | None:
        """Returns the layout of a conversation that asks for an answer; None where the template refuses it."""
        for tools in ((_TOOL,), ()) if with_tools else ((),):  # the template may take calls and no tools
            with suppress(BadRow):
                return self.renderer.layout(Conversation(context, tools, arguments), answering=True)
        return None

    def header(self, arguments: dict[str, Any], with_tools: bool) -> str:
        """Returns what add_generation_prompt adds to a conversation; "" where that is nothing."""
        key = (with_tools, arguments_key(arguments))
        if key not in self._headers:
            self._headers[key] = self._find_header(arguments, with_tools)
        return self._headers[key]

    def _find_header(self, arguments: dict[str, Any], with_tools: bool) -> str:
        asked = self.prompt("user", arguments, with_tools)
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
            if closing is None or self.control.last(closing) in self.header({}, False):  # a template may always ask
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
            call = layout.pieces[-1].removeprefix(self.prompt("user", {}, False) or "").rstrip()
            self._call_end = end if end in call else self.control.at_end(call) or ""
        return self._call_end or None


def _after_names(prompt: str) -> str:
    """Returns the text after the id and the name of the tool's result that it was made with."""
    for word in (_RESULT.tool_call_id, _RESULT.name):
        prompt = prompt.rpartition(str(word))[2]
    return prompt
