"""Texts that were rendered already, with the model's own control tokens at their places (DataSpec.rendered).

What to train is found by the marks of the model's chat template: an answer begins where the generation prompt ends, as
after <|im_start|>assistant or [/INST], and ends with the token that ends the assistant's turns.
"""

import re
from bisect import bisect_left
from collections.abc import Collection
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.control_tokens import any_of
from common.tokens.pieces import Piece, PieceTokeniser

# What begins a turn in the formats that many data sets were rendered in
_OPENERS = (
    *("<|im_start|>", "[INST]", "<start_of_turn>", "<|start_header_id|>", "<|begin_of_text|>", "<|user|>"),
    *("<|system|>", "<|start|>", "<|turn>", "<|START_OF_TURN_TOKEN|>", "<｜User｜>"),
)
OTHER_PROMPT = "answers are trained behind another prompt than the one that the model will be asked with"
_ASKED, _ANSWERED = "\ue000u\ue001", "\ue000a\ue001"  # characters for private use, which no template writes itself
_QUESTION: list[dict[str, Any]] = [{"role": "user", "content": _ASKED}]
_TOOL_CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "f", "arguments": {}}}
_WITH_RESULT: list[dict[str, Any]] = [
    *_QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [_TOOL_CALL]},
    {"role": "tool", "name": "f", "tool_call_id": "a1b2c3d4e", "content": _ANSWERED},
]


def foreign_marks(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Returns what finds the begin of a turn in another model's format: no token of this one, nor in its template.

    It finds nothing for a base model, which may be taught any format.
    """
    own = {token.content for token in tokenizer.added_tokens_decoder.values()}
    template = tokenizer.chat_template
    others = [text for text in _OPENERS if template and text not in own and text not in template]
    return any_of(others)


def refuse_rendered(text: str, control: re.Pattern[str], foreign: re.Pattern[str]) -> None:
    """Raises BadRow for a plain text that was rendered: it holds control tokens, or begins as another model's do."""
    if found := control.search(text):
        raise BadRow(
            f"the text holds the control token {found[0]}: where the model's own chat template rendered it, say "
            "DataSpec(rendered=True); else give messages instead"
        )
    if found := foreign.match(text.removeprefix("<s>").lstrip()):
        raise BadRow(f"the text was rendered for another model: it begins with {found[0]}; give messages instead")


class RenderedText:
    """Finds the answers in texts that were rendered in one model's format."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokeniser: PieceTokeniser, ends: Collection[int]) -> None:
        """ends: the tokens that end the assistant's turns. Raises UserError when the template marks no answers."""
        self.tokenizer, self.tokeniser, self.ends = tokenizer, tokeniser, frozenset(ends)
        self.control = tokeniser.control
        self.end_texts = sorted(tokenizer.convert_ids_to_tokens(list(self.ends)))
        whole = self._render([*_QUESTION, {"role": "assistant", "content": _ANSWERED}] * 2)
        # Within an answer one of these tokens begins something else: the answer has no end.
        self.openers = {
            tokenizer.convert_tokens_to_ids(text) for text in self.control.pattern.findall(whole)
        } - self.ends
        bos = tokenizer.bos_token
        self.bos_count = whole.count(bos) if bos else 0  # of a conversation of two answers
        self.bos_first = bool(bos) and whole.startswith(bos)
        self.headers = self._find_headers(whole)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]], tuple[str, ...]]:
        """Tokenises a text, with one BOS where the template begins with one.

        Returns the ids, start and end of each answer, as indices into them, and notes. An answer begins where the
        generation prompt ends, and its last token is an end token. Raises BadRow when no answer begins in the text,
        when one has no text or no end token, and when BOS stands where the template writes none.
        """
        bos = self.tokenizer.bos_token
        if self.bos_first and not text.startswith(bos):
            text = bos + text
        if self.bos_count < 2 and bos and bos in text[len(bos) if self.bos_first else 0 :]:
            raise BadRow(f"{bos} stands in the middle of it, where the chat template writes none")
        starts = self._answer_starts(text)
        if not starts:
            raise BadRow(self._why_no_answer(text))
        ids, first = self._tokenise(text, starts)
        spans = [(start, self._end_of_answer(ids, start)) for start in first]
        if any(end > following for (_, end), following in zip(spans, first[1:], strict=False)):
            raise BadRow(self._no_end())
        is_asked = all(text.endswith(tuple(self.prompts), 0, start) for start in starts)
        return ids, spans, () if is_asked else (OTHER_PROMPT,)

    def _answer_starts(self, text: str) -> list[int]:
        """Returns where the answers begin: indices into the text, in order."""
        starts = dict[int, int]()  # from the header's place, so that the longest header of a place counts
        for header in sorted(self.headers, key=len):
            starts |= {found.start(): found.end() for found in re.finditer(re.escape(header), text)}
        return sorted(starts.values())

    def _why_no_answer(self, text: str) -> str:
        if found := foreign_marks(self.tokenizer).search(text):
            return f"it was rendered for another model: {found[0]} is no mark of this one's chat template"
        shortest = min(self.headers, key=len)
        return f"it holds no answer: the chat template begins one with {shortest!r}"

    def _tokenise(self, text: str, starts: list[int], cuts: tuple[int, ...] = ()) -> tuple[list[int], list[int]]:
        """Returns the ids, and the index of each answer's first token.

        cuts: where the text is tokenised in two pieces. Where a token reaches over an answer's beginning it is cut,
        because a prompt ends there.
        """
        bounds = pairwise((0, *cuts, len(text)))
        pieces = [Piece(text[start:end], follows=text[max(0, start - 100) : start]) for start, end in bounds]
        ids = [index for piece_ids in self.tokeniser.encode(pieces) for index in piece_ids]
        controls = [0, *(found.start() for found in self.control.finditer(text, 0))]
        places = [0, *self.control.places(ids)]
        if len(places) != len(controls):
            raise BadRow("the tokenizer finds other control tokens in it than the text holds")
        first, torn = [], []
        for start in starts:
            last = bisect_left(controls, start) - 1  # the control token before the answer: nothing merges over it
            (before,) = self.tokeniser.encode([Piece(text[controls[last] : start])])
            first.append(places[last] + len(before))
            if ids[places[last] : first[-1]] != before:
                torn.append(start)
        if torn and not set(torn) <= set(cuts):
            return self._tokenise(text, starts, tuple(sorted({*cuts, *torn})))
        return ids, first

    def _end_of_answer(self, ids: list[int], start: int) -> int:
        """Returns the index after the token that ends the answer."""
        for place in range(start, len(ids)):
            if ids[place] in self.ends:
                if place == start:
                    raise BadRow("an answer in it is empty")
                return place + 1
            if ids[place] in self.openers:
                break
        raise BadRow(self._no_end())

    def _no_end(self) -> str:
        return f"an answer in it has no end token ({' or '.join(self.end_texts)}): it would not teach the model to stop"

    def _find_headers(self, whole: str) -> set[str]:
        """Returns what the template writes before an answer: its generation prompt, and the part that all answers have.

        The prompt of a reasoning model holds <think> as well, or an empty block of thoughts.
        """
        prompts = [self._render(_QUESTION, answering=True).rpartition(_ASKED)[2]]
        prompts += [
            self._render(_QUESTION, answering=True, enable_thinking=thinks).rpartition(_ASKED)[2]
            for thinks in (True, False)
        ]
        written = whole.partition(_ASKED)[2].partition(_ANSWERED)[0]
        prompt, *others = [self._without_end(text) for text in (*prompts, written)]
        # A space before the answer is part of the answer's first word, which the model says itself.
        shared = commonprefix([prompt, *others]).rstrip(" ")
        if not shared.strip():
            raise UserError(
                "the chat template marks no beginning of an answer: rendered texts cannot be trained with it"
            )
        headers = {prompt, shared, shared.partition("<think>")[0] or shared}  # an answer may come without thoughts
        self.prompts = {prompt}
        if prompt == shared and self.control.pattern.fullmatch(prompt):  # a mark of the question's end, as [/INST]
            self.prompts |= self._header_after_result()
        return headers | self.prompts

    def _header_after_result(self) -> set[str]:
        """Returns the control token that ends a tool's result, where the template knows tools and has one."""
        try:
            after = self._render(_WITH_RESULT, answering=True).rpartition(_ANSWERED)[2]
        except UserError:
            return set()
        found = self.control.pattern.findall(after)
        return {found[-1]} if found and after.endswith(found[-1]) else set()

    def _without_end(self, prompt: str) -> str:
        """Returns a prompt without what ends the question's turn."""
        prompt = prompt.lstrip()
        for end in self.end_texts:
            prompt = prompt.removeprefix(end)
        return prompt.lstrip()

    def _render(self, messages: list[dict[str, Any]], *, answering: bool = False, **arguments: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answering, **arguments
            )
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template refuses a conversation of two turns: {error}") from error
        return text
