"""Checks each part of a tokenizer.json against what llama.cpp does with text.

llama.cpp knows two kinds of BPE: byte-level (Llama 3, Qwen), and that made from SentencePiece (Mistral). Either has
fixed rules for all that stands around the vocabulary. A part that says the same, or nothing, passes; so do the few that
change nothing but rare texts, with a note. All else is refused.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.recipe import UserError

# The regular expression that splits the text, and llama.cpp's name for it (its enum llama_vocab_pre_type).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",  # Llama 3
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",  # Qwen2, Qwen2.5, Qwen3
}
IGNORES_MERGES = ("llama-bpe",)  # llama.cpp takes a word that is a token as it is, whatever the merges make of it
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_TO_SPACE = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_NFC = {"type": "NFC"}
# Gemma's: it finds no space to split at, because the normalizer has replaced them.
_SPLIT_AT_SPACE = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
# transformers sets truncation and padding for each call. Prompts are encoded without the post-processor.
_PARTS = {"version", "truncation", "padding", "post_processor"} | {"added_tokens", "decoder", "model", "normalizer"}
_PARTS |= {"pre_tokenizer"}
_MODEL_KEYS = {"type", "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"}
_MODEL_KEYS_OFF = {"dropout": (None, 0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
_ADDED_KEYS = {"id", "content", "special", "normalized"}
_ADDED_KEYS_OFF = ("lstrip", "rstrip", "single_word")
TAKE_MERGE = "make merge writes what transformers and vLLM load"


@dataclass(frozen=True)
class TextRules:
    """How llama.cpp cuts text for a tokenizer."""

    model: str  # "gpt2" for byte-level BPE, "llama" for BPE made from SentencePiece
    pre: str  # llama.cpp's name of the pre-tokenizer
    space_prefix: bool  # whether every text begins with a space
    notes: list[str]  # what llama.cpp does otherwise, for rare texts


def read_text_rules(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], TextRules]:
    """The values of the tokenizer.json that a tokenizer works by, and llama.cpp's rules that do the same.

    Raises UserError for a tokenizer that GGUF cannot express: any but byte-level BPE that splits text as Llama 3,
    Qwen2, GPT-2 or SmolLM do, and BPE made from SentencePiece (Mistral).
    """
    backend = tokenizer.backend_tokenizer
    values: dict[str, Any] = json.loads(backend.to_str())
    model = values["model"]
    if model.get("type") != "BPE":
        raise UserError(f"a tokenizer of type {model.get('type')} cannot be exported to GGUF, BPE can; {TAKE_MERGE}")
    for name in sorted(values.keys() - _PARTS):
        _refuse_part(name, values[name])
    for name in sorted(model.keys() - _MODEL_KEYS):
        if model[name] not in _MODEL_KEYS_OFF.get(name, ()):
            _refuse_part(f"model.{name}", model[name])
    notes = _check_post_processor(tokenizer)
    normalizers = _flatten(values.get("normalizer"), "normalizers")
    if _NFC in normalizers:
        notes.append("llama.cpp does not compose characters (NFC): text with combining accents gives other tokens")
    normalizers = [part for part in normalizers if part != _NFC]
    if model.get("byte_fallback"):
        space_prefix = _check_sentencepiece(values, normalizers)
        notes += _compare_merges(values)
        rules = TextRules("llama", "default", space_prefix, notes)
    else:
        rules = TextRules("gpt2", _check_byte_level(values, normalizers), False, notes)
    for token in values.get("added_tokens") or []:
        _check_added_token(token, backend)
    return values, rules


def _flatten(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a sequence, which may hold sequences; of another part, itself."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [inner for each in part[key] for inner in _flatten(each, key)]


def _refuse_part(name: str, value: Any) -> NoReturn:
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 300 else f"{text[:300]}…"
    raise UserError(f"the tokenizer's {name} cannot be exported to GGUF: {text}; {TAKE_MERGE}")


def _check_byte_level(values: dict[str, Any], normalizers: list[dict[str, Any]]) -> str:
    """Returns llama.cpp's name for the pre-tokenizer of byte-level BPE."""
    model = values["model"]
    if normalizers:
        _refuse_part("normalizer", values["normalizer"])
    if [part.get("type") for part in _flatten(values.get("decoder"), "decoders")] != ["ByteLevel"]:
        _refuse_part("decoder", values.get("decoder"))
    name = _name_pre_tokenizer(values.get("pre_tokenizer"))
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys()
    if missing and model.get("unk_token") is not None:
        raise UserError(
            f"the tokenizer has no token for {len(missing)} of the 256 bytes and writes {model['unk_token']} for them, "
            f"which cannot be exported to GGUF; {TAKE_MERGE}"
        )
    if bool(model.get("ignore_merges")) != (name in IGNORES_MERGES) and not _merges_make_every_token(values):
        _refuse_part("model.ignore_merges", model.get("ignore_merges"))
    return name


def _name_pre_tokenizer(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer. Raises UserError when it has none."""
    parts = _flatten(pre_tokenizer, "pretokenizers")
    kinds = [part.get("type") for part in parts]
    if kinds and kinds[-1] == "ByteLevel" and not parts[-1]["add_prefix_space"]:
        if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
            split = parts[0]
            name = SPLITS.get(split["pattern"].get("Regex", ""))
            if name and split["behavior"] == "Isolated" and not split["invert"]:
                return name
    raise UserError(
        f"a tokenizer that cuts text like this cannot be exported to GGUF: {json.dumps(pre_tokenizer)}; {TAKE_MERGE}"
    )


def _merges_make_every_token(values: dict[str, Any]) -> bool:
    """Whether a word that is a token comes out of the merges as that token: then it is no matter who ignores them.

    Added tokens are cut out of the text before.
    """
    model = values["model"]
    words = model["vocab"].keys() - {token["content"] for token in values.get("added_tokens") or []}
    merges: Any = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    bpe = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges)).model
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    return all(len(bpe.tokenize(token)) == 1 for token in words if token and set(token) <= alphabet)


def _check_sentencepiece(values: dict[str, Any], normalizers: list[dict[str, Any]]) -> bool:
    """Returns whether every text begins with a space.

    With Metaspace's scheme "first" it does so only before the first text of a prompt, which is BOS: no other gets one.
    """
    model = values["model"]
    if {f"<0x{byte:02X}>" for byte in range(256)} - model["vocab"].keys():
        raise UserError(
            f"the tokenizer has no token for some of the 256 bytes, which cannot be exported to GGUF; {TAKE_MERGE}"
        )
    if model.get("ignore_merges"):
        _refuse_part("model.ignore_merges", True)
    if values.get("decoder") is None:
        _refuse_part("decoder", None)
    for part in _flatten(values["decoder"], "decoders"):
        known = part == _TO_SPACE or part.get("type") in ("ByteFallback", "Fuse", "Metaspace")
        if not known and (part.get("type"), part.get("content"), part.get("stop")) != ("Strip", " ", 0):
            _refuse_part("decoder", values["decoder"])
    pre_tokenizer = values.get("pre_tokenizer")
    if normalizers in ([_PREPEND, _TO_MARK], [_TO_MARK]) and pre_tokenizer in (None, _SPLIT_AT_SPACE):
        return _PREPEND in normalizers
    if normalizers:
        _refuse_part("normalizer", values["normalizer"])
    if not pre_tokenizer or pre_tokenizer["type"] != "Metaspace" or pre_tokenizer["replacement"] != _SPACE:
        raise UserError(
            f"a tokenizer that cuts text like this cannot be exported to GGUF: {json.dumps(pre_tokenizer)}; "
            f"{TAKE_MERGE}"
        )
    if pre_tokenizer["split"] and any(_SPACE in token[1:] for token in model["vocab"]):  # llama.cpp does not split
        _refuse_part("pre_tokenizer", pre_tokenizer)
    return bool(pre_tokenizer["prepend_scheme"] == "always")


def _compare_merges(values: dict[str, Any]) -> list[str]:
    """A note when llama.cpp, which joins any two pieces that make a piece, joins more than the merges do."""
    merges = {merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]}
    pieces = values["model"]["vocab"].keys() - {token["content"] for token in values.get("added_tokens") or []}
    pieces -= {piece for piece in pieces if BYTE_TOKEN.fullmatch(piece)}
    pairs = ((piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)))
    more = sorted(f"{a} {b}" for a, b in pairs if a in pieces and b in pieces and f"{a} {b}" not in merges)
    if not more:
        return []
    return [
        f"llama.cpp joins {len(more):,} pairs of tokens that the tokenizer does not, such as '{more[0]}': some texts "
        "give other tokens"
    ]


def _check_added_token(token: dict[str, Any], backend: Tokenizer) -> None:
    changes = backend.normalizer is not None and backend.normalizer.normalize_str(token["content"]) != token["content"]
    odd = [name for name in sorted(token.keys() - _ADDED_KEYS) if token[name] or name not in _ADDED_KEYS_OFF]
    if token["normalized"] and changes:
        odd.append("normalized")
    if odd:
        raise UserError(f"the token {token['content']} with {', '.join(odd)} cannot be exported to GGUF; {TAKE_MERGE}")


def _check_post_processor(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """A note when the post-processor adds more than BOS to a text: training, chat and llama.cpp do without it."""
    plain, full = (tokenizer("Hello", add_special_tokens=special)["input_ids"] for special in (False, True))
    if full in (plain, [tokenizer.bos_token_id, *plain]):
        return []
    added = ", ".join(str(tokenizer.convert_ids_to_tokens(index)) for index in full if index not in plain)
    return [f"the tokenizer adds {added} to a plain text, which was not trained with and is not exported"]
