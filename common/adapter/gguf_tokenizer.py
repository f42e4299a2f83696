"""A tokenizer in GGUF's words: tokens, their kinds, merges or scores, and how text is cut before merging.

llama.cpp has each cut by name and not by rule, so the rules in tokenizer.json are recognised; what is not is an error.
Names and keys: github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer".
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerFast

from common.data.chat_format import ChatFormat
from common.recipe import UserError

# The regular expression that cuts the text, and llama.cpp's name for it (its enum llama_vocab_pre_type).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",  # Llama 3
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",  # Qwen2, Qwen2.5, Qwen3
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF holds of a tokenizer. tokens, types, and scores where the model is "llama", are as long as the model's
    embedding; merges are "a b", where the model is "gpt2"."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer.json in `folder`, filled up to `size` tokens.

    Raises UserError for a tokenizer that GGUF has no words for: other than byte-level BPE cut as Llama 3, Qwen2, GPT-2
    or SmolLM do, and BPE made from SentencePiece (Mistral).
    """
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = values["model"]
    if model.get("type") != "BPE":
        raise UserError(f"a tokenizer of type {model.get('type')} cannot be exported to GGUF; BPE can")
    names = {index: token for token, index in model["vocab"].items()}
    added = {token["id"]: token for token in values.get("added_tokens", [])}
    names |= {index: token["content"] for index, token in added.items()}
    if max(names) >= size:
        raise UserError(f"the tokenizer has {max(names) + 1:,} tokens, and the model only {size:,}: they do not fit")
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    unknown = model.get("unk_token")
    types = []
    for index, token in enumerate(tokens):
        kind = TokenType.NORMAL if index in names else TokenType.UNUSED
        if index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        if model.get("byte_fallback"):
            if token == unknown:
                kind = TokenType.UNKNOWN
            elif _BYTE.fullmatch(token):
                kind = TokenType.BYTE
        types.append(int(kind))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not model.get("byte_fallback"):
        return Vocabulary("gpt2", _cut(values["pre_tokenizer"]), tokens, types, merges, [], False)
    # SentencePiece merges the pair whose result has the highest score: the order of the merges as scores.
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, [], scores, _prepends_space(values))


def _cut(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for a byte-level pre-tokeniser."""
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
    """Whether every text begins with a space. Where only the first of a prompt does ("first"), that is BOS."""
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
        writer.add_chat_template(plain_template(tokenizer.chat_template))


def begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a prompt begins with BOS, by the tokenizer's hand or by the template's."""
    if tokenizer.bos_token_id is None:
        return False
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        if text.startswith(tokenizer.bos_token):
            return True
    return bool(tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id)


def plain_template(template: str) -> str:
    """Without the marks of what is trained, which other programs may not know; the text around them stays as it is."""
    return _GENERATION.sub(r"{{\1 '' \2}}", template)
