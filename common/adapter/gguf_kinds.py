"""The number format of each tensor in a GGUF file: those that llama.cpp's own tool gives to the same tensors."""

from typing import Literal

from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType

from common.adapter.k_quants import K_BLOCK

Quant = Literal["f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]
FILE_TYPES = {
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_k_m": (Kind.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_m": (Kind.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (Kind.Q6_K, LlamaFileType.MOSTLY_Q6_K),
}
# For rows that are no multiple of a block of 256 values; these have blocks of 32.
SMALL_BLOCKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
SMALL_BLOCK = 32
LLAMA_70B_LAYERS = 80


def gguf_kind(name: str, shape: tuple[int, ...], quant: Quant, layers: int, *, tied: bool) -> Kind:
    """The format of a tensor. name: GGUF's. layers: of the model. tied: its embedding is its head too.

    Source: llama.cpp, llama-quant.cpp. The _m ("medium") formats keep what hurts most in 6 bits: the head, and the
    values and the down projections of the first and last eighth of the layers and of every third one between.
    """
    if len(shape) == 1:
        return Kind.F32
    kind, _ = FILE_TYPES[quant]
    if kind in SMALL_BLOCKS:
        part = ".".join(name.split(".")[2:]) if name.startswith("blk.") else name
        if part == "output.weight" or (tied and part == "token_embd.weight"):
            kind = Kind.Q6_K
        elif part in ("attn_v.weight", "ffn_down.weight") and _has_more_bits(int(name.split(".")[1]), layers):
            kind = Kind.Q6_K
        elif part == "attn_v.weight" and kind == Kind.Q4_K and layers == LLAMA_70B_LAYERS:
            kind = Kind.Q5_K
        if shape[-1] % K_BLOCK:
            kind = SMALL_BLOCKS[kind]
    if kind in (Kind.Q8_0, *SMALL_BLOCKS.values()) and shape[-1] % SMALL_BLOCK:
        return Kind.F16
    return kind


def _has_more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
