"""The control tokens of a tokenizer: those that only a chat template may write, never a message."""

import copy
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

# The model's own words, although they are single tokens: an answer may hold them.
_OWN_WORDS = ("<think>", "</think>")


def with_control(tokenizer: PreTrainedTokenizerFast, own_text: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer for which all added tokens in the template's own text are control tokens.

    A tokenizer may have <|im_end|> and not mark it as special: a message with it would end its own turn. It is the same
    tokenizer where nothing is to be marked, otherwise a copy with the same ids.
    """
    added = tokenizer.added_tokens_decoder.values()
    candidates = (t for t in added if not t.special and t.content not in _OWN_WORDS)
    # White space is for everybody, also where it is an added token, as Gemma's line breaks are.
    missing = [t for t in candidates if t.content in own_text and t.content.strip()]
    if not missing:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    marked = [
        AddedToken(
            t.content,
            special=True,
            single_word=t.single_word,
            lstrip=t.lstrip,
            rstrip=t.rstrip,
            normalized=t.normalized,
        )
        for t in missing
    ]
    tokenizer.backend_tokenizer.add_special_tokens(marked)
    return tokenizer


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Returns what finds any of the texts, the first one that fits."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")  # (?!) matches nothing


class ControlTokens:
    """Finds control tokens in texts and among ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        special = {index: t.content for index, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.ids = frozenset(special)
        self.texts = tuple(sorted(special.values(), key=len, reverse=True))
        self.pattern = any_of(self.texts)
        # Words that the tokenizer does not know become the unknown token: it says nothing of a place in the template.
        unknown = tokenizer.unk_token_id
        self._counted_ids = frozenset(special.keys() - {unknown})
        counted = [t for t in self.texts if t != special.get(unknown)]
        self._counted = any_of(counted)
        self._run = re.compile(f"(?:{self._counted.pattern})+")
        self._eos = tokenizer.eos_token

    def count(self, text: str) -> int:
        return sum(1 for _ in self._counted.finditer(text))

    def finditer(self, text: str, position: int) -> Iterator[re.Match[str]]:
        return self._counted.finditer(text, position)

    def places(self, ids: list[int]) -> list[int]:
        """Returns the indices of the control tokens."""
        counted = self._counted_ids
        return [place for place, index in enumerate(ids) if index in counted]

    def last(self, text: str) -> str:
        """Returns the last control token; "" where there is none."""
        return max(self._counted.finditer(text), key=re.Match.start, default=[""])[0]

    def from_last(self, text: str) -> str:
        """Returns the text from its last control token on; "" where there is none."""
        found = max(self._counted.finditer(text), key=re.Match.start, default=None)
        return "" if found is None else text[found.start() :]

    def at_end(self, text: str) -> str | None:
        """Returns the control token that the text ends with."""
        last = self.last(text)
        return last if last and text.endswith(last) else None

    def up_to_end(self, text: str) -> str | None:
        """Returns the text up to its first control token, or up to the end-of-text token in the same run of them."""
        run = self._run.search(text)
        if run is None:
            return None
        tokens = list(self._counted.finditer(run[0]))
        end = next((token.end() for token in tokens if token[0] == self._eos), tokens[0].end())
        return text[: run.start() + end]
