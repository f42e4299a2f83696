"""The fused LoRA linear layers against their reference in float64: values, every gradient, and what they save."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from common.kernels import lora_linear
from common.kernels.lora_linear import (
    LoraLinear,
    lora_linear_add,
    lora_linear_reference,
    rms_norm_lora_linears,
    swiglu_lora_linear_add,
)
from common.kernels.nf4_dequantize import nf4_dequantize
from tests.kernels.test_kernels import EPS, assert_near, exact, norm_in_float64, random


def linear(
    inputs: int, outputs: int, *, rank: int | None = 4, bias: bool = False, scale: float = 2.0, bits: int = 4, seed=0
) -> LoraLinear:
    """A layer with its adapter; of a 4-bit one the weight is NF4 with double quantisation."""
    weight: Tensor = nn.Parameter(random(outputs, inputs, seed=seed) / inputs**0.5, requires_grad=False)
    if bits == 4:
        packed, state = bnb.quantize_4bit(weight.data, blocksize=64, compress_statistics=True, quant_type="nf4")
        weight = nn.Parameter(packed, requires_grad=False)
        weight.quant_state = state
    a, b = (None, None) if rank is None else (random(rank, inputs, seed=seed + 1), random(outputs, rank, seed=seed + 2))
    if a is not None:
        a, b = nn.Parameter(a / 4), nn.Parameter(b / 4)
    return LoraLinear(weight, random(outputs, seed=seed + 3) if bias else None, a, b, scale)


def linear_in_float64(x: Tensor, layer: LoraLinear, a: Tensor | None, b: Tensor | None) -> Tensor:
    """The reference in float64, differentiable in x, a and b, which stand for the layer's own."""
    weight, bias = layer.dequantize(torch.float32).double(), None if layer.bias is None else layer.bias.double()
    return lora_linear_reference(x, replace(layer, weight=weight, bias=bias, a=a, b=b))


CASES = {
    "4 bit": {},
    "with a bias": {"bias": True},
    "scale 1": {"scale": 1.0},
    "16 bit": {"bits": 16},
    "rank 1": {"rank": 1},
    "no adapter": {"rank": None},
    "no adapter, a bias": {"rank": None, "bias": True},
}


def compare(outputs, expected, inputs, exact_inputs, layers, exact_adapters) -> None:
    """Values, and the gradients of every input and adapter, from the same random gradients of the outputs."""
    for got, true in zip(outputs, expected, strict=True):
        assert_near(got, true, 32)
    adapters = [adapter for layer in layers for adapter in (layer.a, layer.b) if adapter is not None]
    grads = [random(*output.shape, seed=70 + i) for i, output in enumerate(outputs)]
    got = torch.autograd.grad(outputs, [*inputs, *adapters], grads)
    true = torch.autograd.grad(expected, [*exact_inputs, *exact_adapters], [grad.double() for grad in grads])
    assert len(got) == len(true)
    for mine, right in zip(got, true, strict=True):
        assert_near(mine, right, 64)


def exact_adapters_of(layers):
    pairs = [(None, None) if layer.a is None else tuple(exact(layer.a, layer.b)) for layer in layers]
    return pairs, [adapter for pair in pairs for adapter in pair if adapter is not None]


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_formula(case):
    """y = x W^T + bias + scale * (x A^T) B^T, spelled out number by number for one output."""
    layer, x = linear(64, 33, **CASES[case]), random(2, 64)
    weight = layer.dequantize(torch.float32)
    y = sum(x[1, i] * weight[5, i] for i in range(64)) + (0 if layer.bias is None else layer.bias[5])
    if layer.a is not None:
        z = [sum(x[1, i] * row[i] for i in range(64)) for row in layer.a]
        y += layer.scale * sum(layer.b[5, r] * z[r] for r in range(len(z)))
    torch.testing.assert_close(lora_linear_reference(x, layer)[1, 5], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_linears_after_a_norm(case, tokens):
    layers = [linear(64, outputs, seed=10 * outputs, **CASES[case]) for outputs in (96, 33, 64)]
    layers[1] = linear(64, 33, rank=3, seed=5)  # another rank beside them
    hidden, weight = random(tokens, 64).requires_grad_(), random(64, seed=9)
    outputs = rms_norm_lora_linears(hidden, weight, EPS, layers)
    (exact_hidden,) = exact(hidden)
    normed = norm_in_float64(exact_hidden, weight.double())
    pairs, adapters = exact_adapters_of(layers)
    expected = [linear_in_float64(normed, layer, *pair) for layer, pair in zip(layers, pairs, strict=True)]
    compare(outputs, [*expected, exact_hidden * 1], [hidden], [exact_hidden], layers, adapters)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_linear_added_to_the_residual(case, tokens):
    layer = linear(64, 33, **CASES[case])
    x, residual = random(tokens, 64).requires_grad_(), random(tokens, 33, seed=8).requires_grad_()
    exact_x, exact_residual = exact(x, residual)
    pairs, adapters = exact_adapters_of([layer])
    expected = exact_residual + linear_in_float64(exact_x, layer, *pairs[0])
    compare(
        [lora_linear_add(x, layer, residual)], [expected], [x, residual], [exact_x, exact_residual], [layer], adapters
    )


def test_as_gemma_combines_them():
    """A norm of 1 + weight before, GELU between, and no residual: a norm of the output comes first."""
    layers = [linear(64, 96), linear(64, 96, seed=4)]
    down = linear(96, 33, seed=5)
    hidden, weight = random(7, 64).requires_grad_(), random(64, seed=9)
    (exact_hidden,) = exact(hidden)
    pairs, adapters = exact_adapters_of([*layers, down])
    normed = norm_in_float64(exact_hidden, weight.double(), one_plus=True)
    gate, up = (linear_in_float64(normed, layer, *pair) for layer, pair in zip(layers, pairs, strict=False))
    expected = linear_in_float64(gelu(gate, approximate="tanh") * up, down, *pairs[2])
    mine_gate, mine_up, again = rms_norm_lora_linears(hidden, weight, EPS, layers, None, True)
    got = swiglu_lora_linear_add(mine_gate, mine_up, down, None, gelu=True)
    compare([got, again], [expected, exact_hidden * 1], [hidden], [exact_hidden], [*layers, down], adapters)

    x = random(7, 96).requires_grad_()
    (exact_x,) = exact(x)
    pairs, adapters = exact_adapters_of([down])
    expected = linear_in_float64(exact_x, down, *pairs[0])
    compare([lora_linear_add(x, down, None)], [expected], [x], [exact_x], [down], adapters)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_linear_after_swiglu_added_to_the_residual(case, tokens):
    layer = linear(64, 33, **CASES[case])
    gate, up = (random(tokens, 64, seed=seed).requires_grad_() for seed in (6, 7))
    residual = random(tokens, 33, seed=8).requires_grad_()
    exact_inputs = exact(gate, up, residual)
    pairs, adapters = exact_adapters_of([layer])
    product = silu(exact_inputs[0]) * exact_inputs[1]
    expected = exact_inputs[2] + linear_in_float64(product, layer, *pairs[0])
    got = swiglu_lora_linear_add(gate, up, layer, residual)
    compare([got], [expected], [gate, up, residual], exact_inputs, [layer], adapters)


def saved_for_backward(run) -> list[Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        run()
    return saved


def test_nothing_is_saved_but_the_inputs():
    layers = [linear(64, 96), linear(64, 96, seed=4)]
    down = linear(96, 64)
    hidden, gate, up = random(7, 64).requires_grad_(), random(7, 96).requires_grad_(), random(7, 96).requires_grad_()
    for run, inputs in (
        (lambda: rms_norm_lora_linears(hidden, random(64), EPS, layers), [hidden]),
        (lambda: lora_linear_add(gate, down, hidden), [gate]),
        (lambda: swiglu_lora_linear_add(gate, up, down, hidden), [gate, up]),
    ):
        assert [tensor.data_ptr() for tensor in saved_for_backward(run)] == [tensor.data_ptr() for tensor in inputs]


class Dequantisations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is nf4_dequantize
        return operator(*args, **(kwargs or {}))


def mlp(hidden: Tensor, layers: list[LoraLinear]) -> Tensor:
    gate, up, hidden = rms_norm_lora_linears(hidden, torch.ones(64), EPS, layers[:2])
    return swiglu_lora_linear_add(gate, up, layers[2], hidden)


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_recompute_skips_the_matmul_whose_result_nobody_reads(early_stop):
    """Each use of a weight dequantises it once: 3 forward, 3 backward, and of the recompute's 3 the last is skipped."""
    layers = [linear(64, 96), linear(64, 96, seed=4), linear(96, 64)]
    hidden = random(7, 64).requires_grad_()
    plain = torch.autograd.grad(mlp(hidden, layers).sum(), [hidden, layers[2].a])
    with Dequantisations() as dequantisations:
        output = checkpoint(mlp, hidden, layers, use_reentrant=False, early_stop=early_stop)
        got = torch.autograd.grad(output.sum(), [hidden, layers[2].a])
    assert dequantisations.count == 3 + 3 + (2 if early_stop else 3)
    assert all(torch.equal(mine, right) for mine, right in zip(got, plain, strict=True))


def test_the_placeholder_that_stands_for_a_saved_pair_takes_no_memory():
    gate, up = random(7, 64).requires_grad_(), random(7, 64).requires_grad_()
    placeholder = lora_linear._KeepGateUp.apply(gate, up, linear(64, 33), None, False, None, None)
    assert placeholder.shape == (7, 33)
    assert placeholder.untyped_storage().nbytes() == 4


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
def test_the_layers_compile_without_a_graph_break():
    layers = [linear(64, 96), linear(64, 96, seed=4), linear(96, 64)]
    hidden = random(7, 64).requires_grad_()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    mine, plain = compiled(hidden, layers), mlp(hidden, layers)
    torch.testing.assert_close(mine, plain)
    inputs = [hidden, layers[0].a, layers[2].b]
    for got, right in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (mine, plain)), strict=True):
        torch.testing.assert_close(got, right)
