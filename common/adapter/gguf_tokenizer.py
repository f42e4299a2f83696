"""Translates a tokenizer.json to GGUF: tokens, their types, merges or scores, and the name of its pre-tokenizer.

A pre-tokenizer splits text before merges are applied. tokenizer.json describes it by rules; llama.cpp implements each
under a name. So the rules are compared with those of the known names, and any others are an error.
Names and keys: github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer".
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerFast

from common.data.chat_format import ChatFormat
from common.recipe import UserError

# The regular expression that splits the text, and llama.cpp's name for it (its enum llama_vocab_pre_type).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",  # Llama 3
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",  # Qwen2, Qwen2.5, Qwen3
}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_GENERATION_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF holds of a tokenizer."""

    model: str  # "gpt2" for byte-level BPE, "llama" for BPE made from SentencePiece
    pre: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]  # one for each row of the model's embedding
    types: list[int]  # gguf.TokenType of each token
    merges: list[str]  # "a b"; none for "llama"
    scores: list[float]  # of each token; none for "gpt2"
    space_prefix: bool  # whether every text begins with a space


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Reads the tokenizer.json in `folder`, and fills its tokens up to `size`, the rows of the model's embedding.

    Raises UserError for a tokenizer that GGUF cannot express: any but byte-level BPE that splits text as Llama 3,
    Qwen2, GPT-2 or SmolLM do, and BPE made from SentencePiece (Mistral).
    """
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = values["model"]
    if model.get("type") != "BPE":
        raise UserError(f"a tokenizer of type {model.get('type')} cannot be exported to GGUF; BPE can")
    names = {index: token for token, index in model["vocab"].items()}
    names |= {token["id"]: token["content"] for token in values.get("added_tokens", [])}
    if max(names) >= size:
        raise UserError(f"the tokenizer has {max(names) + 1:,} tokens, and the model only {size:,}: they do not fit")
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    types = _token_types(values, tokens, known=names.keys())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not model.get("byte_fallback"):
        return Vocabulary("gpt2", _name_pre_tokenizer(values["pre_tokenizer"]), tokens, types, merges, [], False)
    # SentencePiece merges the pair whose result has the highest score: the order of the merges gives the scores.
    order: dict[str, int] = {}
    for number, merge in enumerate(merges):
        order.setdefault(merge.replace(" ", ""), number)
    scores = [-float(order.get(token, len(merges))) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, [], scores, _prepends_space(values))


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
        elif model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(token):
            kind = TokenType.BYTE
        types.append(int(kind))
    return types


def _name_pre_tokenizer(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer. Raises UserError when it has none."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [(part or {}).get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"] and parts[0]["behavior"] == "Isolated":
        name = SPLITS.get(parts[0]["pattern"].get("Regex", ""))
        if name:
            return name
    raise UserError(f"a tokenizer that cuts text like this cannot be exported to GGUF: {json.dumps(pre_tokenizer)}")


def _prepends_space(values: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before every text.

    With the scheme "first" it does so only before the first text of a prompt, which is BOS: no other text gets one.
    """
    normalizer, pre_tokenizer = json.dumps(values.get("normalizer")), values.get("pre_tokenizer") or {}
    return '"Prepend"' in normalizer or pre_tokenizer.get("prepend_scheme") == "always"


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    """Writes the vocabulary, the special tokens and the chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_eot_token_id, ChatFormat(tokenizer).end_of_turn_id()),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(strip_generation_marks(tokenizer.chat_template))


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
