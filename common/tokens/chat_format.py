"""Turns conversations into token ids and labels, with the model's own chat template.

Trained are the assistant's turns, each from where the generation prompt ends to the token that generation stops at. So
the tokens before a turn are the prompt that the model gets when it is asked, and what is trained is all that it has to
say itself. This works with any template, without marks in it and without a copy of it.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from os.path import commonprefix

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.conversations.conversation import Conversation, Example
from common.recipe import TrainOn, UserError
from common.sources.source_row import BadRow
from common.tokens.control_tokens import ControlTokens, with_control
from common.tokens.labels import IGNORED
from common.tokens.pieces import Piece, PieceTokeniser
from common.tokens.rendered_chat import PlainText, RenderedChat, refuse_untrained, up_to_last_answer
from common.tokens.rendered_text import RenderedText, foreign_marks, refuse_rendered
from common.tokens.rendering import Renderer
from common.tokens.template_messages import beside_texts
from common.tokens.template_samples import SAMPLE
from common.tokens.turns import DROPPED_THOUGHTS, THOUGHTLESS, TurnFinder
from common.tokens.vocabulary import describe_beyond, tokens_beyond


@dataclass(frozen=True)
class Tokens:
    """One tokenised example. A label is the token at its own position (not shifted by one), or IGNORED.

    Of better and worse answers, several conversations one behind the other: lengths are the tokens of each, and signs 1
    for a chosen or good answer and -1 for a rejected or bad one. Otherwise both are empty.
    """

    input_ids: list[int]
    labels: list[int]  # as long as input_ids
    turn_ends: list[int]  # for each trained turn of the assistant: the index after its last token
    notes: tuple[str, ...] = ()  # what a user should know of it, as a kind: the report counts examples by it
    lengths: tuple[int, ...] = ()
    signs: tuple[int, ...] = ()

    def prompt(self) -> list[int]:
        """The token ids before the first one that is trained."""
        return self.input_ids[: next((i for i, label in enumerate(self.labels) if label != IGNORED), None)]

    def conversations(self) -> list["Tokens"]:
        """Each conversation by itself, without notes: the example alone where it is one."""
        if not self.lengths:
            return [self]
        ends = list(accumulate(self.lengths))
        return [
            Tokens(
                self.input_ids[end - length : end],
                self.labels[end - length : end],
                [turn - end + length for turn in self.turn_ends if end - length < turn <= end],
            )
            for length, end in zip(self.lengths, ends, strict=True)
        ]


class ChatFormat:
    """Renders and tokenises conversations in one model's format."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, rendered: bool = False) -> None:
        """rendered: texts are taken as rendered already (DataSpec.rendered)."""
        self.tokenizer, self.rendered = tokenizer, rendered
        self.foreign = foreign_marks(tokenizer)
        self.renderer = Renderer(tokenizer)
        marked = with_control(tokenizer, self.renderer.own_text(SAMPLE))
        self.control = ControlTokens(marked)
        self.tokeniser = PieceTokeniser(marked, self.control)
        self.turn_finder = TurnFinder(self.renderer, self.control)
        self.beyond = tokens_beyond(tokenizer)

    def encode(self, example: Example, train_on: TrainOn = "assistant") -> Tokens:
        """Tokenises one example: one BOS where the model has one, no padding, no truncation.

        Raises BadRow when the template refuses the conversation or changes what it says, when none of its answers can
        be trained, and when a message holds a token that the model has no embedding for. Raises UserError when the
        model has no template, or one that cannot be trained with.
        """
        (tokens,) = self.encode_batch([example], train_on)
        if isinstance(tokens, BadRow):
            raise tokens
        return tokens

    def encode_batch(self, examples: list[Example], train_on: TrainOn = "assistant") -> list[Tokens | BadRow]:
        """Tokenises examples in one call of the tokenizer. Returns what encode returns, or raises, for each.

        Raises UserError as encode does.
        """
        if self.rendered:
            return [self._encode_rendered(example, train_on) for example in examples]
        prepared = [self._prepare(example) for example in examples]
        pieces = [[] if isinstance(one, BadRow) else one.pieces() for one in prepared]
        encoded = iter(self.tokeniser.encode([piece for several in pieces for piece in several]))
        found: list[Tokens | BadRow] = []
        for one, several in zip(prepared, pieces, strict=True):
            ids = [next(encoded) for _ in several]
            try:
                if isinstance(one, BadRow):
                    raise one
                found.append(
                    self._to_tokens(one, ids, train_on) if isinstance(one, RenderedChat) else self._to_text(ids[0])
                )
            except BadRow as fault:
                found.append(fault)
        return found

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Tokenises a conversation up to where the assistant's next answer begins, as encode does before the answer.

        Control tokens in a message become plain text. Raises BadRow as encode does.
        """
        chat = self._render(conversation, answering=True)
        return self._join(chat, self.tokeniser.encode(chat.pieces()))[0]

    def last_message(self, prompt_ids: list[int]) -> str:
        """Returns the text of the last user message in a prompt, without the template's text around it."""
        text: str = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        if not self.tokenizer.chat_template:
            return text
        user, assistant = SAMPLE.messages
        try:
            pieces = self.renderer.layout(Conversation((user, assistant, user))).pieces
        except BadRow:  # a template for one question and its answer
            pieces = self.renderer.layout(Conversation((user,))).pieces * 2
        before_each_user = common_ending(pieces[0], pieces[2]).strip()
        text = text.strip()
        for prompt in self.turn_finder.samples.prompts("user", Conversation(())):
            text = text.removesuffix(prompt.strip())
        return (text.rpartition(before_each_user)[2] if before_each_user else text).strip()

    @cached_property
    def begin_of_text_id(self) -> int | None:
        """The token that plain text begins with; None where there is none.

        SmolLM2's BOS is <|im_start|>, which begins each turn: before a plain text it would begin a turn of nobody.
        """
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer.chat_template and bos in self.turn_finder.samples.header({}, False):
            return None
        index: int | None = self.tokenizer.bos_token_id
        return index

    def end_of_turn_id(self) -> int | None:
        """Returns the token that ends the assistant's turns; without a template the end-of-text token."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.eos_token_id
        return self._control_id(self.control.last(self.turn_finder.samples.closing()))

    def end_of_turn_ids(self) -> set[int]:
        """Returns the tokens that end the assistant's turns, those with a call of a tool too."""
        ids = {self.end_of_turn_id()}
        if self.tokenizer.chat_template and (end := self.turn_finder.samples.call_end()) is not None:
            ids.add(self._control_id(end))
        return {index for index in ids if index is not None}

    def _control_id(self, text: str) -> int:
        index: int = self.tokenizer.convert_tokens_to_ids(text)
        return index

    def refuse_untrained_tokens(self, embedding: Tensor) -> None:
        """Raises UserError when a control token of the template has a near-zero row in the input embedding.

        embedding: (vocabulary, hidden). Base Llama 3 has such rows for the chat tokens: they were never trained, and a
        frozen embedding cannot learn them.
        """
        if not self.tokenizer.chat_template:
            return
        # In parts: on a CPU, where an embedding may wait for a GPU's run, torch makes an fp32 copy of what it is given.
        parts = embedding.detach().split(1 << 13)
        norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts])
        floor = 1e-3 * norms.median()
        chat = self._render(self.turn_finder.samples.sample())
        ids = self._join(chat, self.tokeniser.encode(chat.pieces()))[0]
        for index in sorted(self.control.ids & set(ids)):
            if norms[index] <= floor:
                raise UserError(
                    f"the chat template needs {self.tokenizer.convert_ids_to_tokens(index)}, which this model was "
                    "never trained on (its embedding is zero): take the Instruct version"
                )

    def _prepare(self, example: Example) -> RenderedChat | PlainText | BadRow:
        try:
            if isinstance(example, str):
                refuse_rendered(example, self.control.pattern, self.foreign)
                return PlainText(example)
            chat = self._render(*up_to_last_answer(example))
            self.turn_finder.samples.closing()
            return chat
        except BadRow as fault:
            return fault

    @cached_property
    def rendered_text(self) -> RenderedText:
        self._require_template()
        return RenderedText(self.tokenizer, self.tokeniser, self.end_of_turn_ids())

    def _encode_rendered(self, example: Example, train_on: TrainOn) -> Tokens | BadRow:
        if not isinstance(example, str):
            raise UserError(
                "DataSpec(rendered=True) is for rows of text alone, and these are conversations: leave it out"
            )
        try:
            ids, spans, notes = self.rendered_text.encode(example)
            self._refuse_beyond(ids)
        except BadRow as fault:
            return fault
        labels = list(ids) if train_on == "everything" else [IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        labels[0] = IGNORED  # no token stands before it, to predict it from
        return Tokens(ids, labels, [end for _, end in spans], notes)

    def _require_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the model has no chat template: it is a base model. Take its Instruct version, give "
                "ModelSpec(chat_template='my_template.jinja'), or train on plain text"
            )

    def _render(
        self, conversation: Conversation, notes: tuple[str, ...] = (), *, answering: bool = False
    ) -> RenderedChat:
        self._require_template()
        self._refuse_control_tokens(conversation)
        text, layout, spans = self.renderer.render(conversation, answering=answering)
        turns = self.turn_finder.find(conversation, layout)
        plain = [span for span in spans if self.control.pattern.search(text, *span)]
        unknown = [name for name in conversation.template_arguments if name not in self.renderer.template]
        notes += tuple(f"the chat template does not know the argument {name}" for name in unknown)
        chat = RenderedChat(conversation, text, turns, spans, plain, set(), notes + layout.notes)
        chat.cuts |= {chat.start_of(turn) for turn in turns.trainable if not turn.prompt_end}
        return chat

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        """Raises BadRow when a control token stands where it could not be tokenised as plain text."""
        for word in beside_texts(conversation):
            if found := self.control.pattern.search(word):
                raise BadRow(f"a tool, a call of one or a template argument holds the control token {found[0]}")

    def _join(self, chat: RenderedChat, encoded: list[list[int]]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Returns the ids of a conversation, the indices of control tokens, and start and end of each trainable turn.

        Where a token reaches over the end of a generation prompt, the text is tokenised once more, in two pieces there.
        """
        ids, index_of = list[int](), dict[int, int]()  # index_of: from a piece's place in the text to that in the ids
        for piece_start, piece_ids in zip(chat.edges(), encoded, strict=False):
            index_of[piece_start] = len(ids)
            ids += piece_ids
        controls = self.control.places(ids)
        if len(controls) != chat.turns.control_count:
            raise BadRow("the tokenizer finds other control tokens in it than the chat template writes")
        turns, torn = list[tuple[int, int]](), set[int]()
        for turn in chat.turns.trainable:
            start = index_of.get(chat.start_of(turn)) if chat.cuts else None
            if start is None:
                prompt_end = self.tokeniser.alone(turn.prompt_end)
                first = controls[turn.prompt_control]
                start = first + len(prompt_end)
                if ids[first:start] != prompt_end:
                    torn.add(chat.start_of(turn))
            turns.append((start, controls[turn.end_control] + 1))
        if torn:
            chat.cuts |= torn
            return self._join(chat, self.tokeniser.encode(chat.pieces()))
        self._refuse_beyond(ids, chat)
        return ids, controls, turns

    def _to_tokens(self, chat: RenderedChat, encoded: list[list[int]], train_on: TrainOn) -> Tokens:
        ids, _, spans = self._join(chat, encoded)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError("the chat template begins a conversation twice: more than one BOS token")
        notes, turn_ends = list(chat.notes), []
        labels = list(ids) if train_on == "everything" else [IGNORED] * len(ids)
        for turn, (start, end) in zip(chat.turns.trainable, spans, strict=True):
            if chat.conversation.messages[turn.message].is_trained:
                labels[start:end] = ids[start:end]
                turn_ends.append(end)
                notes += turn.notes
            else:
                labels[start:end] = [IGNORED] * (end - start)
        untrained = [index for index in chat.turns.untrainable if chat.conversation.messages[index].is_trained]
        reasons = [chat.turns.untrainable[index] for index in untrained]
        if train_on == "everything":  # then these answers are trained too, as the template writes them
            reasons = [THOUGHTLESS for reason in reasons if reason == DROPPED_THOUGHTS]
        notes += reasons
        if not turn_ends:
            refuse_untrained(chat)
        if train_on == "everything" and len(untrained) < len(chat.turns.untrainable):
            raise BadRow("an answer that is not to be learnt cannot be told from the rest of the text")
        labels[0] = IGNORED  # no token stands before it, to predict it from
        return Tokens(ids, labels, turn_ends, tuple(dict.fromkeys(notes)))

    def _to_text(self, ids: list[int]) -> Tokens:
        self._refuse_beyond(ids)
        bos, eos = self.begin_of_text_id, self.tokenizer.eos_token_id
        ids = [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]
        return Tokens(ids, [IGNORED, *ids[1:]], [len(ids)])

    def _refuse_beyond(self, ids: list[int], chat: RenderedChat | None = None) -> None:
        """Raises BadRow when the model has no embedding for one of the tokens, UserError when it is the template's."""
        if self.beyond.keys().isdisjoint(ids):
            return
        index = next(index for index in ids if index in self.beyond)
        if chat is not None:
            messages = self.tokeniser.encode([Piece(chat.text[a:b], True, chat.text_before(a)) for a, b in chat.spans])
            if not any(index in message for message in messages):
                raise UserError(
                    f"the chat template needs the token {describe_beyond(self.tokenizer, index)}: take the "
                    "tokenizer and the template that belong to the model"
                )
        raise BadRow(f"it holds the token {describe_beyond(self.tokenizer, index)}")


def common_ending(a: str, b: str) -> str:
    """Returns the longest text that both end with."""
    return commonprefix([a[::-1], b[::-1]])[::-1]
