"""Translates a tokenizer to GGUF: tokens, their types, merges or scores, special tokens and the chat template.

Names and keys: github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer".
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerFast

from common.adapter.tokenizer_json import BYTE_TOKEN, TextRules, read_text_rules
from common.recipe import UserError
from common.tokens.chat_format import ChatFormat

MAX_ENDING_TOKENS = 3  # that GGUF has keys for
_GENERATION_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF holds of a tokenizer."""

    rules: TextRules
    tokens: list[str]  # one for each row of the model's embedding
    types: list[int]  # gguf.TokenType of each token
    merges: list[str]  # "a b"; none for "llama"
    scores: list[float]  # of each token; none for "gpt2"


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, size: int) -> Vocabulary:
    """Reads the tokens, and fills them up to `size`, the rows of the model's embedding.

    Raises UserError as read_text_rules, and for a tokenizer with more tokens than the model has rows.
    """
    values, rules = read_text_rules(tokenizer)
    model = values["model"]
    names = {index: token for token, index in model["vocab"].items()}
    names |= {token["id"]: token["content"] for token in values.get("added_tokens", [])}
    if max(names) >= size:
        raise UserError(f"the tokenizer has {max(names) + 1:,} tokens, and the model only {size:,}: they do not fit")
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    types = _token_types(values, tokens, known=names.keys())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if rules.model == "gpt2":
        return Vocabulary(rules, tokens, types, merges, [])
    # SentencePiece merges the pair whose result has the highest score: the order of the merges gives the scores.
    order: dict[str, int] = {}
    for number, merge in enumerate(merges):
        order.setdefault(merge.replace(" ", ""), number)
    scores = [-float(order.get(token, len(merges))) for token in tokens]
    return Vocabulary(rules, tokens, types, [], scores)


def _token_types(values: dict[str, Any], tokens: list[str], known: Collection[int]) -> list[int]:
    """The gguf.TokenType of each token. values: of tokenizer.json. known: ids of the tokens that stand in it."""
    model = values["model"]
    is_special = {token["id"]: token["special"] for token in values.get("added_tokens", [])}
    types = []
    for index, token in enumerate(tokens):
        kind = TokenType.NORMAL if index in known else TokenType.UNUSED
        if index in is_special:
            kind = TokenType.CONTROL if is_special[index] else TokenType.USER_DEFINED
        if model.get("byte_fallback") and token == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        elif model.get("byte_fallback") and BYTE_TOKEN.fullmatch(token):
            kind = TokenType.BYTE
        types.append(int(kind))
    return types


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary, stops: Sequence[int]
) -> None:
    """Writes the vocabulary, the special tokens and the chat template. stops: ids of all tokens that end an answer."""
    ends = ending_tokens(tokenizer, stops)
    writer.add_tokenizer_model(vocabulary.rules.model)
    writer.add_tokenizer_pre(vocabulary.rules.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.rules.space_prefix)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        *zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(strip_generation_marks(tokenizer.chat_template))


def ending_tokens(tokenizer: PreTrainedTokenizerFast, stops: Sequence[int]) -> list[int | None]:
    """The tokens that end an answer, in the order of GGUF's keys, which are three: end of text, of turn, of message.

    llama.cpp stops at each of them. Further ids of `stops` follow, for which there is no key.
    """
    named = [tokenizer.eos_token_id, ChatFormat(tokenizer).end_of_turn_id()]
    return [*named, *(index for index in stops if index not in named)]


def begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a prompt begins with BOS, which the tokenizer or the chat template puts there."""
    if tokenizer.bos_token_id is None:
        return False
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        if text.startswith(tokenizer.bos_token):
            return True
    return bool(tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id)


def strip_generation_marks(template: str) -> str:
    """Replaces `{% generation %}` and its end, which other programs may not know, by empty expressions.

    An expression keeps the dashes of the tag that it replaces, so white space around it is stripped as before.
    """
    return _GENERATION_MARK.sub(r"{{\1 '' \2}}", template)
