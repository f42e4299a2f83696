"""Turns a conversation into token ids and labels, with the model's own chat template.

Trained are the assistant's texts and the token that ends each of its turns. To find them in the rendered text, the
template is rendered once more with a placeholder in each message's place: what stands between the placeholders is the
template's own text. This works with any template, without marks in it and without a copy of it.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.conversation import Conversation, Example, Message
from common.data.labels import IGNORED
from common.data.rendered_text import RenderedText, foreign_marks
from common.data.source_row import BadRow
from common.data.vocabulary import describe_beyond, tokens_beyond
from common.recipe import TrainOn, UserError

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")  # private-use characters around a message's index
_THOUGHTS_START = "<think>"
_SAMPLE = Conversation((Message("user", "Hello"), Message("assistant", "Hi")))

Span = tuple[int, int]  # start and end of a piece of text, in characters


@dataclass(frozen=True)
class Tokens:
    """One tokenised example. A label is the token at its own position (not shifted by one), or IGNORED."""

    input_ids: list[int]
    labels: list[int]  # as long as input_ids
    turn_ends: list[int]  # for each assistant turn: the index after its last trained token
    notes: tuple[str, ...] = ()  # what a user should know of it, as a kind: the report counts examples by it


@dataclass(frozen=True)
class TemplateText:
    """The template's own text around the messages of a conversation."""

    pieces: list[str]  # pieces[i] stands before the i-th message of the rendered text; the last one follows all
    order: list[int]  # index in the conversation of the i-th message of the rendered text: a template may move some

    def fill(self, contents: list[str]) -> tuple[str, dict[int, Span]]:
        """Returns the text with these messages put in, and where each stands: from its index to its span."""
        text, spans = self.pieces[0], {}
        for index, following in zip(self.order, self.pieces[1:], strict=True):
            spans[index] = (len(text), len(text) + len(contents[index]))
            text += contents[index] + following
        return text, spans


class ChatFormat:
    """Renders and tokenises conversations in one model's format."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, rendered: bool = False) -> None:
        """rendered: texts are taken as rendered already (DataSpec.rendered)."""
        self.tokenizer, self.rendered = tokenizer, rendered
        added = tokenizer.added_tokens_decoder
        self.control_ids = {index for index, token in added.items() if token.special}
        texts = sorted((added[index].content for index in self.control_ids), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, texts)) if texts else "(?!)")  # (?!) matches nothing
        self.foreign = foreign_marks(tokenizer) if tokenizer.chat_template else None
        self.beyond = tokens_beyond(tokenizer)
        self._template_texts: dict[tuple[tuple[str, ...], bool], TemplateText] = {}

    def encode(self, example: Example, train_on: TrainOn = "assistant") -> Tokens:
        """Tokenises one example: one BOS where the model has one, no padding, no truncation.

        Raises BadRow when the template refuses the conversation or changes a message's text, and when a message holds
        a token that the model has no embedding for. Raises UserError when the model has no template, or one that cannot
        be trained with.
        """
        if isinstance(example, str):
            return self._encode_rendered(example, train_on) if self.rendered else self._encode_text(example)
        if self.rendered:
            raise UserError(
                "DataSpec(rendered=True) is for rows of text alone, and these are conversations: leave it out"
            )
        self._require_template()
        text, spans = self._render_with_spans(example)
        ids, ends = self._tokenise(text, list(spans.values()))
        labels = list(ids) if train_on == "everything" else [IGNORED] * len(ids)
        turn_ends = []
        for index, (start, end) in spans.items():
            if example.messages[index].role != "assistant":
                continue
            stop = self._end_of_turn(text, end)
            trained = [position for position, token_end in enumerate(ends) if start < token_end <= stop]
            for position in trained:
                labels[position] = ids[position]
            turn_ends.append(trained[-1] + 1)
        labels[0] = IGNORED  # no token stands before it, to predict it from
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids.count(bos) > 1:
            raise UserError("the chat template begins a conversation twice: more than one BOS token")
        return Tokens(ids, labels, turn_ends)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Tokenises a conversation that ends with the user's turn, up to where the assistant's answer begins.

        Control tokens in a message become plain text. Raises BadRow as encode does.
        """
        text, spans = self._render_with_spans(conversation, answering=True)
        return self._tokenise(text, list(spans.values()))[0]

    def last_message(self, prompt_ids: list[int]) -> str:
        """Returns the text of the last user message in a prompt, without the template's text around it."""
        text: str = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        if not self.tokenizer.chat_template:
            return text
        user, assistant = _SAMPLE.messages
        three_turns = self._template_text(Conversation((user, assistant, user)))
        before_first_user, before_answer, before_second_user, _ = three_turns.pieces
        before_each_user = common_ending(before_first_user, before_second_user).strip()
        text = text.strip().removesuffix(before_answer.strip())
        return (text.rpartition(before_each_user)[2] if before_each_user else text).strip()

    def end_of_turn_id(self) -> int | None:
        """Returns the token that ends the assistant's turns; without a template the end-of-text token."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.eos_token_id
        tokens = self.encode(_SAMPLE)
        return tokens.input_ids[tokens.turn_ends[-1] - 1]

    def refuse_untrained_tokens(self, embedding: Tensor) -> None:
        """Raises UserError when a control token of the template has a near-zero row in the input embedding.

        embedding: (vocabulary, hidden). Base Llama 3 has such rows for the chat tokens: they were never trained, and a
        frozen embedding cannot learn them.
        """
        if not self.tokenizer.chat_template:
            return
        norms = torch.linalg.vector_norm(embedding.detach(), dim=1, dtype=torch.float32)  # makes no fp32 copy of it
        floor = 1e-3 * norms.median()
        for index in sorted(self.control_ids & set(self.encode(_SAMPLE).input_ids)):
            if norms[index] <= floor:
                raise UserError(
                    f"the chat template needs {self.tokenizer.convert_ids_to_tokens(index)}, which this model was "
                    "never trained on (its embedding is zero): take the Instruct version"
                )

    @cached_property
    def rendered_text(self) -> RenderedText:
        end = ChatFormat(self.tokenizer).end_of_turn_id()
        return RenderedText(self.tokenizer, [] if end is None else [end])

    def _require_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the model has no chat template: it is a base model. Take its Instruct version, give "
                "ModelSpec(chat_template='my_template.jinja'), or train on plain text"
            )

    def _encode_rendered(self, text: str, train_on: TrainOn) -> Tokens:
        self._require_template()
        ids, spans = self.rendered_text.encode(text)
        self._refuse_beyond(ids)
        labels = list(ids) if train_on == "everything" else [IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        labels[0] = IGNORED  # no token stands before it, to predict it from
        return Tokens(ids, labels, [end for _, end in spans])

    def _encode_text(self, text: str) -> Tokens:
        if found := self.control.search(text):
            raise BadRow(
                f"the text holds the control token {found[0]}: where the model's own chat template rendered it, say "
                "DataSpec(rendered=True); else give messages instead"
            )
        if self.foreign is not None and (found := self.foreign.match(text.removeprefix("<s>").lstrip())):
            raise BadRow(f"the text was rendered for another model: it begins with {found[0]}; give messages instead")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self._refuse_beyond(ids)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]
        return Tokens(ids, [IGNORED, *ids[1:]], [len(ids)])

    def _render(self, conversation: Conversation, contents: list[str], answering: bool) -> str:
        messages = [{"role": m.role, "content": text} for m, text in zip(conversation.messages, contents, strict=True)]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from error

    def _template_text(self, conversation: Conversation, answering: bool = False) -> TemplateText:
        """Returns the template's own text around the messages. Conversations with the same roles share one."""
        # Qwen3's template treats a turn that begins with its thoughts differently, so its placeholder begins with them.
        messages = conversation.messages
        starts = [_THOUGHTS_START if m.content.lstrip().startswith(_THOUGHTS_START) else "" for m in messages]
        key = (tuple(m.role + start for m, start in zip(messages, starts, strict=True)), answering)
        if key not in self._template_texts:
            placeholders = [f"{start}\ue000{index}\ue001" for index, start in enumerate(starts)]
            # re.split gives the texts between the placeholders, and between those texts the placeholders' numbers.
            split = _PLACEHOLDER.split(self._render(conversation, placeholders, answering))
            pieces, order = split[0::2], [int(number) for number in split[1::2]]
            if sorted(order) != list(range(len(conversation.messages))):
                raise BadRow("the chat template drops or repeats a message")
            for position, index in enumerate(order):
                pieces[position] = pieces[position].removesuffix(starts[index])
            self._template_texts[key] = TemplateText(pieces, order)
        return self._template_texts[key]

    def _render_with_spans(self, conversation: Conversation, *, answering: bool = False) -> tuple[str, dict[int, Span]]:
        """Returns the rendered text, and where each message stands in it: from its index to its span."""
        template_text = self._template_text(conversation, answering)
        contents = [m.content for m in conversation.messages]
        rendered = self._render(conversation, contents, answering)
        for expected in (contents, [content.strip() for content in contents]):  # many templates strip messages
            text, spans = template_text.fill(expected)
            if text == rendered:
                return text, spans
        raise BadRow("the chat template changes the text of a message")

    def _end_of_turn(self, text: str, content_end: int) -> int:
        """Returns where the control token ends that closes the assistant's turn, as an index into `text`."""
        match = self.control.search(text, content_end)
        if match is None:
            raise UserError(
                "the chat template ends the assistant's turn without a control token: nothing would stop it"
            )
        return match.end()

    def _tokenise(self, text: str, messages: list[Span]) -> tuple[list[int], list[int]]:
        """Returns the token ids, and for each token the index in `text` at which its characters end.

        A control token inside a message is tokenised as plain text: what a user writes can never end or open a turn.
        """
        pieces, position = [], 0  # start, end, and whether control tokens are plain text there
        for start, end in messages:
            if self.control.search(text, start, end):
                pieces += [(position, start, False), (start, end, True)]
                position = end
        pieces.append((position, len(text), False))
        ids: list[int] = []
        ends: list[int] = []
        for start, end, is_plain in pieces:
            piece = self.tokenizer(
                text[start:end], add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=is_plain
            )
            ids += piece["input_ids"]
            ends += [start + token_end for _, token_end in piece["offset_mapping"]]
        if not self.beyond.keys().isdisjoint(ids):
            in_messages = [any(start < token_end <= stop for start, stop in messages) for token_end in ends]
            for index, in_message in zip(ids, in_messages, strict=True):
                if index in self.beyond and not in_message:
                    raise UserError(
                        f"the chat template needs the token {describe_beyond(self.tokenizer, index)}: take the "
                        "tokenizer and the template that belong to the model"
                    )
            self._refuse_beyond(ids)
        return ids, ends

    def _refuse_beyond(self, ids: list[int]) -> None:
        """Raises BadRow when the model has no embedding for one of the tokens."""
        for index in ids:
            if index in self.beyond:
                raise BadRow(f"it holds the token {describe_beyond(self.tokenizer, index)}")


def common_ending(a: str, b: str) -> str:
    """Returns the longest text that both end with."""
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return a[len(a) - length :]
