"""A conversation becomes token ids and labels, through the model's own chat template.

The text between the messages is found by rendering the template over placeholders, so the place of each message in the
text is known exactly, whatever the template; no template needs marks or a copy. What is trained: the assistant's text
and the token that ends its turn.
"""

import os
import re
from dataclasses import dataclass

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.conversations import Conversation, Example, Message
from common.data.files import BadRow
from common.data.labels import IGNORED
from common.recipe import TrainOn, UserError

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")  # private-use characters around a message's index
THINK = "<think>"
_SAMPLE = (Message("user", "Hello"), Message("assistant", "Hi"))


@dataclass(frozen=True)
class Tokens:
    """One example. input_ids and labels: equally long; labels are the ids themselves or IGNORED, never shifted."""

    input_ids: list[int]
    labels: list[int]
    turn_ends: list[int]  # index just after each assistant turn's last trained token


class ChatFormat:
    """Renders and tokenises conversations as one model wants them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.control_ids = {index for index, token in added.items() if token.special}
        texts = sorted((added[index].content for index in self.control_ids), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, texts)) if texts else "(?!)")
        self._skeletons: dict[tuple[str, ...], list[str | int]] = {}

    def encode(self, example: Example, train_on: TrainOn = "assistant") -> Tokens:
        """Token ids and labels of one example: one BOS where the model has one, no padding, nothing cut.

        Raises BadRow when the template refuses the conversation or changes a message's text, and UserError when there
        is no template, or none that can be trained with.
        """
        if isinstance(example, str):
            return self._encode_text(example)
        if not self.tokenizer.chat_template:
            raise UserError(
                "the model has no chat template: it is a base model. Take its Instruct version, give "
                "ModelSpec(chat_template='my_template.jinja'), or train on plain text"
            )
        text, spans = self._place(example)
        ids, ends = self._tokenise(text, [span for _, span in spans])
        labels = list(ids) if train_on == "everything" else [IGNORED] * len(ids)
        turn_ends = []
        for index, (start, end) in spans:
            if example[index].role != "assistant":
                continue
            stop = self._end_of_turn(text, end)
            trained = [position for position, token_end in enumerate(ends) if start < token_end <= stop]
            for position in trained:
                labels[position] = ids[position]
            turn_ends.append(trained[-1] + 1)
        labels[0] = IGNORED  # nothing comes before it that could foretell it
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids.count(bos) > 1:
            raise UserError("the chat template begins a conversation twice: more than one BOS token")
        return Tokens(ids, labels, turn_ends)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation that ends with the user's turn, ready for the assistant's answer.

        Control tokens in a message are plain text. Raises BadRow as encode.
        """
        text, spans = self._place(conversation, answering=True)
        return self._tokenise(text, [span for _, span in spans])[0]

    def last_message(self, prompt_ids: list[int]) -> str:
        """The text of the last message in a prompt: what stands between the template's own texts around it."""
        text: str = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        if not self.tokenizer.chat_template:
            return text
        first, _, answering, _, again, *_ = self._skeleton((*_SAMPLE, _SAMPLE[0]))
        opening = os.path.commonprefix([str(first)[::-1], str(again)[::-1]])[::-1].strip()
        text = text.strip().removesuffix(str(answering).strip())
        return (text.rpartition(opening)[2] if opening else text).strip()

    def end_of_turn_id(self) -> int | None:
        """The id of the token that ends the assistant's turns; the end of text for a model without a template."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.eos_token_id
        tokens = self.encode(_SAMPLE)
        return tokens.input_ids[tokens.turn_ends[-1] - 1]

    def refuse_untrained_tokens(self, embedding: Tensor) -> None:
        """Raises UserError when a control token of the template has a near-zero row in the input embedding.

        embedding: (vocabulary, hidden). In base Llama 3 the chat tokens are such rows: they were never trained, and
        with a frozen embedding they cannot be learnt.
        """
        if not self.tokenizer.chat_template:
            return
        norms = torch.linalg.vector_norm(embedding.detach(), dim=1, dtype=torch.float32)  # without an fp32 copy
        floor = 1e-3 * norms.median()
        for index in sorted(self.control_ids & set(self.encode(_SAMPLE).input_ids)):
            if norms[index] <= floor:
                raise UserError(
                    f"the chat template needs {self.tokenizer.convert_ids_to_tokens(index)}, which this model was "
                    "never trained on (its embedding is zero): take the Instruct version"
                )

    def _encode_text(self, text: str) -> Tokens:
        if self.control.search(text):
            raise BadRow("the text holds control tokens: it was rendered already; give messages instead")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]
        return Tokens(ids, [IGNORED, *ids[1:]], [len(ids)])

    def _render(self, conversation: Conversation, contents: list[str], answering: bool) -> str:
        messages = [{"role": m.role, "content": text} for m, text in zip(conversation, contents, strict=True)]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from error

    def _skeleton(self, conversation: Conversation, answering: bool = False) -> list[str | int]:
        """The template's own text, and between its pieces the index of each message."""
        # Qwen3's template treats a turn that begins with its thoughts differently.
        leads = [THINK if m.content.lstrip().startswith(THINK) else "" for m in conversation]
        key = (*(m.role + lead for m, lead in zip(conversation, leads, strict=True)), "answer" * answering)
        if key not in self._skeletons:
            rendered = self._render(conversation, [f"{lead}\ue000{i}\ue001" for i, lead in enumerate(leads)], answering)
            pieces: list[str | int] = list(_PLACEHOLDER.split(rendered))
            pieces[1::2] = [int(index) for index in pieces[1::2]]
            if sorted(pieces[1::2]) != list(range(len(conversation))):
                raise BadRow("the chat template drops or repeats a message")
            for at, index in enumerate(pieces[1::2]):
                pieces[2 * at] = str(pieces[2 * at]).removesuffix(leads[int(index)])
            self._skeletons[key] = pieces
        return self._skeletons[key]

    def _place(
        self, conversation: Conversation, answering: bool = False
    ) -> tuple[str, list[tuple[int, tuple[int, int]]]]:
        """The rendered text, and for each message its index and its span of characters."""
        skeleton = self._skeleton(conversation, answering)
        original = [m.content for m in conversation]
        rendered = self._render(conversation, original, answering)
        for contents in (original, [text.strip() for text in original]):  # many templates strip messages
            text, spans = "", []
            for piece in skeleton:
                if isinstance(piece, int):
                    spans.append((piece, (len(text), len(text) + len(contents[piece]))))
                    piece = contents[piece]
                text += piece
            if text == rendered:
                return text, spans
        raise BadRow("the chat template changes the text of a message")

    def _end_of_turn(self, text: str, content_end: int) -> int:
        """Where the control token ends that closes the assistant's turn."""
        match = self.control.search(text, content_end)
        if match is None:
            raise UserError(
                "the chat template ends the assistant's turn without a control token: nothing would stop it"
            )
        return match.end()

    def _tokenise(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Token ids, and for each the end of its characters. Control tokens count as such outside of `spans` only."""
        cuts = [0]
        for start, end in spans:
            if self.control.search(text, start, end):
                cuts += [start, end]  # as plain text: what a user writes can never end a turn or open one
        ids: list[int] = []
        ends: list[int] = []
        for number, (start, end) in enumerate(zip(cuts, [*cuts[1:], len(text)], strict=True)):
            plain = number % 2 == 1
            piece = self.tokenizer(
                text[start:end], add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=plain
            )
            ids += piece["input_ids"]
            ends += [start + token_end for _, token_end in piece["offset_mapping"]]
        return ids, ends
