"""Which part of a rendered conversation is trained: each turn of the assistant, as the model will be asked for it.

A turn begins where the generation prompt ends, and ends with the token that generation stops at. What the model cannot
be asked for in this way is not trained, and said.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from common.conversations.conversation import Conversation, Message
from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.control_tokens import ControlTokens
from common.tokens.outline import TextLayout
from common.tokens.rendering import Renderer, has_tools
from common.tokens.template_samples import TemplateSamples

DROPPED_THOUGHTS = "answers are not trained whose thoughts the chat template drops"
THOUGHTLESS = "answers are trained without their thoughts, which the chat template drops"  # train_on="everything"
OTHER_BEGINNING = "answers are not trained that the chat template begins otherwise than its generation prompt"
WRITTEN_LATER = (
    "earlier answers are trained without system message or tools: the chat template writes them further down"
)
OTHER_END = "earlier answers are not trained: the chat template ends them otherwise than the last one"


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
class AssistantTurns:
    """What can be trained of a conversation, and why the rest cannot."""

    trainable: list[Turn]
    untrainable: dict[int, str]  # from the message to the note that says why
    control_count: int  # control tokens in the template's own text


class TurnFinder:
    """Finds the turns of the assistant in the layouts of one chat template."""

    def __init__(self, renderer: Renderer, control: ControlTokens) -> None:
        self.control = control
        self.samples = TemplateSamples(renderer, control)
        # The layouts that the renderer keeps are those of many conversations.
        self._found = WeakKeyDictionary[TextLayout, AssistantTurns]()

    def find(self, conversation: Conversation, layout: TextLayout) -> AssistantTurns:
        """Returns the turns of the assistant. Raises UserError when no control token ends a turn."""
        if layout not in self._found:
            self._found[layout] = self._find(conversation, layout)
        return self._found[layout]

    def _find(self, conversation: Conversation, layout: TextLayout) -> AssistantTurns:
        first_controls = [0]  # number of the first control token in each piece
        for piece in layout.pieces:
            first_controls.append(first_controls[-1] + self.control.count(piece))
        places = dict[int, list[int]]()  # of a message's texts in the layout
        for number, owner in enumerate(layout.owners):
            places.setdefault(owner, []).append(number)
        turns = AssistantTurns([], {}, first_controls[-1])
        with_tools, written_later = has_tools(conversation), _written_later(conversation, layout)
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
                    if written_later[start[0]] < index or layout.tools_at > start[0]:
                        notes = (*notes, WRITTEN_LATER)
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
        layout: TextLayout,
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
        if end is None:
            return OTHER_END
        return start, end

    def _find_start(
        self, conversation: Conversation, layout: TextLayout, index: int, begin: tuple[int, int], with_tools: bool
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
            if previous is None or index - 1 in layout.places:
                previous = conversation.messages[layout.owners[piece - 1]]
            else:
                follows_text = False
        if previous is not None and (previous.tool_calls or previous.role == "tool"):
            follows_text = False  # the call stands between, or the result's id
        has_thoughts = index in layout.thoughts_shown
        for arguments, notes in self.samples.arguments(conversation, has_thoughts):
            alone = self.samples.header(arguments, with_tools)
            prompt: str | None = alone
            if previous is not None and not previous.tool_calls:
                prompt = self.samples.prompt(previous.role, arguments, with_tools)
            if follows_text:
                for skipped in _left_of(layout.tails[piece - 1]):
                    if prompt is not None and text.startswith(skipped + prompt):
                        return (piece, len(skipped + prompt)), prompt, notes
                continue
            for wanted in (prompt, alone):
                if wanted and (found := text.find(wanted, position)) >= 0:
                    return (piece, found + len(wanted)), wanted, notes
        return None

    def _find_end(
        self, message: Message, layout: TextLayout, after: tuple[int, int], has_text: bool
    ) -> tuple[int, int] | None:
        """Returns where the token ends that ends the turn, as piece and place in it; None where there is none.

        after: where its text ends, or where it begins when it has none.
        """
        piece, position = after
        text = layout.pieces[piece]
        try:
            closing = self.samples.closing()
        except (UserError, BadRow):  # which is for those to say who want to train
            return None
        if message.tool_calls:
            ends = {self.control.last(closing), self.samples.call_end()}
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


def _written_later(conversation: Conversation, layout: TextLayout) -> list[int]:
    """Returns, for each piece, the first of the system messages whose texts stand behind it; past all where none do."""
    first = [len(conversation.messages)]
    for owner in reversed(layout.owners):
        is_system = conversation.messages[owner].role == "system"
        first.append(min(first[-1], owner) if is_system else first[-1])
    return first[::-1]


def _left_of(tail: str) -> list[str]:
    """Returns what a template may leave of the blanks and tags behind a text, the longest first."""
    return [tail[:length] for length in range(len(tail), -1, -1)]
