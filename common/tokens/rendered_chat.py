"""Conversations and texts that are rendered and not tokenised yet."""

from dataclasses import dataclass, replace
from itertools import pairwise

from common.conversations.conversation import Conversation
from common.sources.source_row import BadRow
from common.tokens.outline import Span
from common.tokens.pieces import Piece
from common.tokens.turns import DROPPED_THOUGHTS, OTHER_BEGINNING, OTHER_END, AssistantTurns, Turn

AFTER_LAST_ANSWER = "what follows the last answer is left out"


@dataclass
class PlainText:
    """A text on its way to tokens."""

    text: str

    def pieces(self) -> list[Piece]:
        return [Piece(self.text)]


@dataclass
class RenderedChat:
    """A rendered conversation on its way to tokens."""

    conversation: Conversation
    text: str
    turns: AssistantTurns
    spans: list[Span]  # of the messages' texts
    plain: list[Span]  # of those with control tokens in them
    cuts: set[int]  # where the text is tokenised in two pieces
    notes: tuple[str, ...]

    def start_of(self, turn: Turn) -> int:
        """Returns where the turn begins, as an index into the text."""
        piece, offset = turn.start
        return (self.spans[piece - 1][1] if piece else 0) + offset

    def edges(self) -> list[int]:
        return sorted({0, len(self.text), *self.cuts, *(edge for span in self.plain for edge in span)})

    def pieces(self) -> list[Piece]:
        if not self.cuts and not self.plain:
            return [Piece(self.text)]
        plain = {start for start, _ in self.plain}
        return [
            Piece(self.text[start:end], start in plain, self.text_before(start))
            for start, end in pairwise(self.edges())
        ]

    def text_before(self, place: int) -> str:
        """The end of the text before a place: enough to tell what a piece follows."""
        return self.text[max(0, place - 100) : place]


def up_to_last_answer(conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
    """Returns the conversation without what follows the assistant's last turn, and a note where there is any.

    Raises BadRow when the assistant has no turn.
    """
    messages = conversation.messages
    if messages and messages[-1].role == "assistant":
        return conversation, ()
    count = max((i + 1 for i, message in enumerate(messages) if message.role == "assistant"), default=0)
    if not count:
        raise BadRow("the assistant has no turn in it")
    return replace(conversation, messages=messages[:count]), (AFTER_LAST_ANSWER,)


def refuse_untrained(chat: RenderedChat) -> None:
    """Raises BadRow, which says why no turn of the conversation is trained."""
    messages, untrainable = chat.conversation.messages, chat.turns.untrainable
    reasons = {reason for index, reason in untrainable.items() if messages[index].is_trained}
    if DROPPED_THOUGHTS in reasons:
        raise BadRow(
            "no answer can be trained: the chat template drops their thoughts; leave them out, or write them into the "
            "texts"
        )
    if OTHER_BEGINNING in reasons:
        raise BadRow("no answer can be trained: the chat template begins them otherwise than its generation prompt")
    if OTHER_END in reasons:
        raise BadRow("no answer can be trained: the chat template ends them otherwise than an answer alone")
    raise BadRow("none of its answers is to be learnt, the data says")
