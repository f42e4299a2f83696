"""k-quants: read back by the gguf package, and beside what llama.cpp's own quantizer makes of the same values."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from benchmarks.k_quants import llama_cpp_quantize, read_gguf, relative_error
from common.adapter.gguf_kinds import gguf_kind
from common.adapter.k_quants import K_QUANTS, quantize_k
from tests.adapter.test_gguf import LlamaCpp, export, furthest, merged_model, noise


def weights(form: str) -> torch.Tensor:
    """(8, 2048) values of a kind that weights have, or might."""
    torch.manual_seed(0)
    normal = torch.randn(8, 2048)
    return {
        "normal": normal * 0.02,
        "heavy tails": torch.distributions.StudentT(3).sample(normal.shape) * 0.02,
        "positive": normal.abs(),
        "negative": -normal.abs(),
        "far from zero": normal * 0.01 + 1,
        "an outlier": torch.where(torch.arange(2048) == 700, 30.0, normal * 0.02),
        "mostly zero": normal * (torch.rand(normal.shape) < 0.05),
        "large": normal * 1e4,
        "tiny": normal * 1e-4,
    }[form]


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "form",
    ["normal", "heavy tails", "positive", "negative", "far from zero", "an outlier", "mostly zero", "large", "tiny"],
)
def test_the_error_is_at_most_a_twentieth_above_llama_cpps(kind, form):
    values = weights(form)
    ours, theirs = quantize_k(values, kind), llama_cpp_quantize(values, kind)
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    assert relative_error(ours, kind, values) <= 1.05 * relative_error(theirs, kind, values)


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_zeros_stay_zeros_and_every_dtype_gives_the_bytes_of_its_values(kind):
    assert not dequantize(quantize_k(torch.zeros(2, 512), kind), kind).any()
    for dtype in (torch.bfloat16, torch.float16):
        values = weights("normal").to(dtype)
        assert (quantize_k(values, kind) == quantize_k(values.float(), kind)).all()


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_a_weight_is_quantized_alike_in_parts_and_whole(kind, monkeypatch):
    whole = quantize_k(weights("normal"), kind)
    monkeypatch.setattr("common.adapter.k_quants.VALUES_AT_A_TIME", 3 * 256)
    assert (quantize_k(weights("normal"), kind) == whole).all()


# What llama.cpp's tool made of the 18 layers of Gemma 3 270M (hidden 640, tied) in q4_k_m.
SIX_BITS = {0, 1, 4, 7, 10, 13, 15, 16, 17}


def test_tensors_have_the_formats_that_llama_cpp_gives_them():
    def kind(name: str, *shape: int) -> str:
        return gguf_kind(name, shape, "q4_k_m", 18, tied=True).name

    assert kind("token_embd.weight", 262144, 640) == "Q8_0"
    assert kind("output_norm.weight", 640) == "F32"
    for layer in range(18):
        six = layer in SIX_BITS
        assert kind(f"blk.{layer}.attn_q.weight", 1024, 640) == "Q5_0"
        assert kind(f"blk.{layer}.attn_output.weight", 640, 1024) == "Q4_K"
        assert kind(f"blk.{layer}.attn_v.weight", 256, 640) == ("Q8_0" if six else "Q5_0")
        assert kind(f"blk.{layer}.ffn_down.weight", 640, 2048) == ("Q6_K" if six else "Q4_K")


def test_heads_embeddings_and_odd_rows_have_their_own_formats():
    def kind(name: str, *shape: int, quant: str = "q4_k_m", layers: int = 32, tied: bool = False) -> str:
        return gguf_kind(name, shape, quant, layers, tied=tied).name

    assert kind("output.weight", 128256, 4096) == "Q6_K"
    assert kind("token_embd.weight", 128256, 4096) == "Q4_K"
    assert kind("token_embd.weight", 128256, 4096, tied=True) == "Q6_K"
    assert kind("blk.5.attn_v.weight", 1024, 8192, layers=80) == "Q6_K"
    assert kind("blk.11.attn_v.weight", 1024, 8192, layers=80) == "Q5_K"
    assert kind("blk.11.attn_v.weight", 1024, 4096, quant="q5_k_m") == "Q5_K"
    assert kind("blk.5.ffn_up.weight", 14336, 4096, quant="q6_k") == "Q6_K"
    assert kind("blk.5.ffn_up.weight", 100, 48) == "F16"
    assert kind("blk.5.ffn_up.weight", 100, 48, quant="q8_0") == "F16"
    assert kind("blk.5.ffn_up.weight", 100, 48, quant="bf16") == "BF16"


@pytest.mark.parametrize("quant", ["q4_k_m", "q5_k_m", "q6_k"])
def test_llama_cpp_computes_what_the_bytes_say(adapted, tmp_path, quant):
    """Against transformers with the dequantized weights. llama.cpp rounds what it multiplies to 8 bits as well."""
    size = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1088}
    recipe = adapted("llama", **size, num_hidden_layers=3)
    path = export(recipe, tmp_path / "x.gguf", quant)
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {Kind.F32, Kind.Q6_K, {"q4_k_m": Kind.Q4_K, "q5_k_m": Kind.Q5_K, "q6_k": Kind.Q6_K}[quant]}
    model = merged_model(recipe, tmp_path / "merged")
    unquantized = furthest(LlamaCpp(path), model, noise(10, 24))
    read_gguf(path, model)
    exact = furthest(LlamaCpp(path), model, noise(10, 24))
    # An int8 beside the largest of 256 values is off by up to 1 / 254 of about three times their size. As a random walk
    # through 6 blocks (attention and MLP of 3 layers), on logits of at most 4: 3 / 254 * 6 ** 0.5 * 4 = 0.12
    assert exact < 0.12
    assert exact < unquantized / 2  # it is the rounding that makes the difference
