"""Every operator against float64, forward and each gradient: the reference, and its Triton kernel, interpreted.

On a GPU the same cases run compiled and in bf16 (tests/test_gpu.py). Without a GPU the kernels are compiled at least,
for each generation of cards.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor
from torch.nn.functional import gelu, silu

from common import kernels
from common.kernels import HAS_TRITON, KERNELS, REFERENCES, cross_entropy, nf4_dequantize, rms_norm, rope, swiglu
from tests.conftest import ROOT

EPS = 1e-5
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton for this machine (requirements-dev.txt)")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton interprets where there is no GPU; here: ARGS='-m gpu'"
)
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=[needs_triton, interpreted])]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_near(got: Tensor, expected: Tensor, units: float = 8) -> None:
    """Within so many units in the last place of the largest entry, for the dtype of `got`."""
    limit = units * torch.finfo(got.dtype).eps * expected.abs().max().item()
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max().item() <= limit


def norm_in_float64(x: Tensor, weight: Tensor, one_plus: bool = False) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + one_plus)


def rope_in_float64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = x.unflatten(1, (-1, cos.shape[-1]))
    first, second = heads.chunk(2, -1)
    return (heads * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]).flatten(1)


# Operators and Triton launchers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (3, 64), (5, 100), (2, 5120)])
@pytest.mark.parametrize("one_plus", [False, True])
def test_rms_norm(shape, dtype, implementation, one_plus):
    forward, backward = {
        "reference": (rms_norm.rms_norm_forward, rms_norm.rms_norm_backward),
        "triton": (rms_norm.rms_norm_triton, rms_norm.rms_norm_backward_triton),
    }[implementation]
    x, grad, residual = (random(*shape, seed=seed, dtype=dtype) for seed in (0, 1, 2))
    weight = random(shape[1], seed=3, dtype=dtype)
    exact_x, exact_weight = exact(x, weight)
    expected = norm_in_float64(exact_x, exact_weight, one_plus)
    assert_near(forward(x, weight, EPS, one_plus), expected)
    assert_near(forward(x, weight, EPS, one_plus, residual), expected + residual.double())
    (expected_grad,) = torch.autograd.grad(expected, exact_x, grad.double())
    assert_near(backward(grad, x, weight, EPS, None, one_plus), expected_grad, 16)
    onto = backward(grad, x, weight, EPS, residual, one_plus)
    assert_near(onto, expected_grad + residual.double(), 16)
    if one_plus:
        return
    if implementation == "reference":
        rms_norm.rms_norm_backward_onto_(grad, x, weight, EPS, residual)
    else:
        rms_norm.rms_norm_backward_onto_triton_(grad, x, weight, EPS, residual)
    assert torch.equal(residual, onto)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_norm_of_one_plus_its_weight_rounds_once(implementation):
    """A weight below half a unit of bf16 at one is lost where 1 + weight is rounded before the product."""
    operator = {"reference": rms_norm.rms_norm_forward, "triton": rms_norm.rms_norm_triton}[implementation]
    x, weight = random(3, 64, dtype=torch.bfloat16) * 64, torch.full((64,), 3e-3, dtype=torch.bfloat16)
    exact_result = norm_in_float64(x.double(), weight.double(), True)
    error = (operator(x, weight, EPS, True).double() - exact_result).abs()
    # to the nearest: half a unit in the last place; Triton's interpreter cuts off, which is a whole one
    assert (error <= exact_result.abs() * 2 ** -(7 if implementation == "triton" else 8)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "key_heads", "dim"), [(1, 1, 1, 2), (7, 5, 3, 12), (3, 40, 8, 128)])
def test_rope(tokens, heads, key_heads, dim, dtype, implementation):
    operator = {"reference": rope.rotate, "triton": rope.rotate_triton}[implementation]
    query, key = random(tokens, heads * dim, dtype=dtype), random(tokens, key_heads * dim, seed=1, dtype=dtype)
    angles = random(tokens, dim // 2, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for got, source in zip(operator(query, key, cos, sin, False), (query, key), strict=True):
        (x,) = exact(source)
        expected = rope_in_float64(x, cos.double(), sin.double())
        assert_near(got, expected)
        (grad,) = torch.autograd.grad(expected, x, source.double())
        again = operator(query, key, cos, sin, True)[0 if source is query else 1]
        assert_near(again, grad)
    onto_ = {"reference": rope.rotate_onto_, "triton": rope.rotate_onto_triton_}[implementation]
    for inverse in (False, True):
        expected = operator(query, key, cos, sin, inverse)
        onto_(query, key, cos, sin, inverse)
        assert torch.equal(query, expected[0]) and torch.equal(key, expected[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (2, 1024)])
@pytest.mark.parametrize("gelu_tanh", [False, True])
def test_swiglu(shape, dtype, implementation, gelu_tanh):
    forward, backward_ = {
        "reference": (swiglu.swiglu, swiglu.swiglu_backward_),
        "triton": (swiglu.swiglu_triton, swiglu.swiglu_backward_triton_),
    }[implementation]
    gate, up, grad = (random(*shape, seed=seed, dtype=dtype) for seed in (0, 1, 2))
    exact_gate, exact_up = exact(gate, up)
    expected = (gelu(exact_gate, approximate="tanh") if gelu_tanh else silu(exact_gate)) * exact_up
    assert_near(forward(gate, up, gelu_tanh), expected)
    of_gate, of_up = torch.autograd.grad(expected, (exact_gate, exact_up), grad.double())
    copies = grad.clone(), gate.clone(), up.clone()
    product, grad_gate = backward_(grad, gate, up, gelu_tanh)
    assert_near(product, expected)
    assert_near(grad_gate, of_gate, 16)
    assert_near(grad, of_up, 16)  # in place
    if gelu_tanh:
        return
    onto_, backward_onto_ = {
        "reference": (swiglu.swiglu_onto_, swiglu.swiglu_backward_onto_),
        "triton": (swiglu.swiglu_onto_triton_, swiglu.swiglu_backward_onto_triton_),
    }[implementation]
    backward_onto_(*copies)
    assert all(torch.equal(got, right) for got, right in zip(copies, (grad, grad_gate, product), strict=True))
    onto_(gate, up)
    assert torch.equal(gate, product)


NF4_SHAPES = [(1, 2), (1, 64), (7, 10), (64, 96), (130, 130), (257, 64)]


def nf4(shape: tuple[int, int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Any]:
    """A weight of noise whose scales differ, packed by bitsandbytes, and its quant_state."""
    weight = (random(*shape) * random(shape[0], 1, seed=1).exp()).to(dtype).to(device)
    return bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def nf4_arguments(packed: Tensor, state: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    outer = state.state2
    return packed, state.absmax, state.code, outer.absmax, outer.code, state.offset, state.shape, dtype


def nf4_by_hand(packed: Tensor, state: Any) -> Tensor:
    """The weight in fp32 by its formula, value by value."""
    outer, size = state.state2, state.shape.numel()
    outer_scales = outer.absmax.repeat_interleave(256)[: len(state.absmax)]
    scales = outer.code[state.absmax.long()] * outer_scales + state.offset
    halves = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten()[:size]
    return (state.code[halves.long()] * scales.repeat_interleave(64)[:size]).view(state.shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", nf4_dequantize.NF4_DTYPES)
@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_is_dequantized_bit_for_bit(shape, dtype, implementation):
    """Blocks that are not full, more scales than one program reads, and a second scale of scales (257 rows)."""
    operator = {"reference": nf4_dequantize.nf4_dequantize, "triton": nf4_dequantize.nf4_dequantize_triton}
    packed, state = nf4(shape)
    assert nf4_dequantize.is_supported(state, dtype)
    expected = nf4_by_hand(packed, state)
    if implementation == "reference" and shape == (64, 96):
        pytest.skip("bitsandbytes 0.50.2 on a CPU takes wrong scales for rows of 96 values; no model has such")
    if implementation == "triton" and dtype == torch.bfloat16:
        # Triton's interpreter cuts off what bf16 has no bits for, where a card rounds (tests/test_gpu.py).
        expected = (expected.view(torch.int32) & -0x10000).view(torch.float32)
    got = operator[implementation](*nf4_arguments(packed, state, dtype))
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, expected.to(dtype))


def test_other_quantizations_are_left_to_bitsandbytes():
    weight = random(64, 64)
    for options in ({"quant_type": "fp4"}, {"blocksize": 128}, {"compress_statistics": False}):
        _, state = bnb.quantize_4bit(weight, **{"quant_type": "nf4", "compress_statistics": True} | options)
        assert not nf4_dequantize.is_supported(state, torch.bfloat16), options
    assert not nf4_dequantize.is_supported(nf4((64, 64))[1], torch.float64)


def cross_entropy_in_float64(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods, and the gradient of their sum."""
    x = logits.double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    return nll.detach(), torch.autograd.grad(nll.sum(), x)[0]


CROSS_ENTROPIES = {"reference": cross_entropy.cross_entropy_, "triton": cross_entropy.cross_entropy_triton_}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# The last ones take two and three blocks of the kernel, and the last one 26 rows of the reference at a time.
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (5, 16_385), (27, 40_000)])
def test_cross_entropy(shape, dtype, implementation):
    operator_ = CROSS_ENTROPIES[implementation]
    logits = (4 * random(*shape)).to(dtype)
    targets = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(1))
    targets[0] = shape[1] - 1
    expected, expected_grad = cross_entropy_in_float64(logits, targets)
    written = logits.clone()
    assert_near(operator_(written, targets, 0.0), expected)
    assert torch.equal(written, logits)  # 0: no gradient
    assert_near(operator_(written, targets, 1024.0), expected)
    assert_near(written, 1024 * expected_grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings(
    "ignore:.*(overflow|invalid value|divide by zero):RuntimeWarning"
)  # NumPy's: infinity is right
def test_cross_entropy_of_extreme_logits(dtype, implementation):
    largest, never = torch.finfo(dtype).max / 4, float("-inf")
    logits = torch.full((6, 20_000), never, dtype=dtype)
    logits[0] = 7.0  # all equal: log(20000) each
    logits[1] = largest  # equal, and as large as may be
    logits[2, 16_383:16_386] = torch.tensor([-largest, largest, largest], dtype=dtype)  # over the edge of a block
    logits[3, 19_999] = 0.0  # the target alone is possible
    logits[4] = random(20_000).to(dtype) * 100
    logits[5, :100] = 0.0  # the target is impossible
    targets = torch.tensor([3, 19_999, 16_384, 19_999, 5, 200])
    expected, expected_grad = cross_entropy_in_float64(logits, targets)
    nll = CROSS_ENTROPIES[implementation](logits, targets, 1.0)
    assert nll[5] == expected[5] == float("inf")
    assert_near(nll[:5], expected[:5])
    assert_near(logits, expected_grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|divide by zero):RuntimeWarning")  # NumPy's
def test_cross_entropy_hides_no_number_that_is_not_finite(implementation):
    logits = torch.zeros(4, 20_000)
    logits[0, 17_000], logits[1, 5], logits[2, 17_000] = float("nan"), float("nan"), float("inf")
    logits[3] = float("-inf")  # no token is possible
    nll = CROSS_ENTROPIES[implementation](logits, torch.tensor([0, 5, 0, 0]), 1.0)
    assert not nll.isfinite().any()


@needs_triton
@interpreted
@pytest.mark.parametrize("target", [-100, 50])
def test_the_kernel_answers_a_target_outside_of_the_vocabulary_with_nan(target):
    """It would read beside the logits; the reference raises."""
    nll = cross_entropy.cross_entropy_triton_(torch.zeros(2, 50), torch.tensor([1, target]), 1.0)
    assert nll[0].isfinite() and nll[1].isnan()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy.cross_entropy_(torch.zeros(2, 50), torch.tensor([1, target]), 1.0)


def test_the_operators_are_what_torch_expects_of_one():
    """Schema and fake version: what fake tensors, checkpointing and torch.compile go by."""
    x, weight = random(3, 8), random(8)
    arguments = {
        rms_norm.rms_norm_forward: (x, weight, EPS),
        rms_norm.rms_norm_backward: (x + 1, x, weight, EPS, x + 2),
        rope.rotate: (random(3, 16), random(3, 8), random(3, 4), random(3, 4), False),
        swiglu.swiglu: (x, x + 1),
        swiglu.swiglu_backward_: (x, x + 1, x + 2),
        rms_norm.rms_norm_backward_onto_: (x + 1, x, weight, EPS, x + 2),
        rope.rotate_onto_: (random(3, 16), random(3, 8), random(3, 4), random(3, 4), False),
        swiglu.swiglu_onto_: (x, x + 1),
        swiglu.swiglu_backward_onto_: (x, x + 1, x + 2),
        nf4_dequantize.nf4_dequantize: nf4_arguments(*nf4((6, 32)), torch.bfloat16),
        cross_entropy.cross_entropy_: (x + 3, torch.tensor([0, 7, 2]), 1.0),
    }
    assert arguments.keys() == REFERENCES.keys()
    for operator, values in arguments.items():
        torch.library.opcheck(operator, values)
    for operator, values in (
        (rms_norm.rms_norm_forward, (x, weight, EPS, True, x + 2)),
        (rms_norm.rms_norm_backward, (x + 1, x, weight, EPS, x + 2, True)),
        (swiglu.swiglu, (x, x + 1, True)),
        (swiglu.swiglu_backward_, (x, x + 1, x + 2, True)),
    ):
        torch.library.opcheck(operator, values)


def test_the_gradients_of_the_norm_and_of_rope_are_those_of_float64():
    """As the layers use them, by name; two times the same, and none for what is frozen."""
    x, weight = random(5, 24).requires_grad_(), random(24)
    exact_x, exact_weight = exact(x, weight)
    (got,) = torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS), x, random(5, 24, seed=1))
    (expected,) = torch.autograd.grad(norm_in_float64(exact_x, exact_weight), exact_x, random(5, 24, seed=1).double())
    assert_near(got, expected, 16)
    residual = random(5, 24, seed=2).requires_grad_()
    added = rms_norm.rms_norm(x, weight, EPS, True, residual)
    got, of_residual = torch.autograd.grad(added, (x, residual), random(5, 24, seed=1))
    expected = norm_in_float64(exact_x, exact_weight, True)
    assert_near(added, expected + residual.double())
    assert_near(got, torch.autograd.grad(expected, exact_x, random(5, 24, seed=1).double())[0], 16)
    assert torch.equal(of_residual, random(5, 24, seed=1))
    query, key, angles = random(5, 24).requires_grad_(), random(5, 12, seed=1).requires_grad_(), random(5, 3, seed=2)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    outputs = rope.rope(query, key, cos, sin)
    grads = random(5, 24, seed=3), random(5, 12, seed=4)
    inputs = exact(query, key)
    right = [rope_in_float64(states, cos.double(), sin.double()) for states in inputs]
    for mine, true in zip(
        torch.autograd.grad(outputs, (query, key), grads),
        torch.autograd.grad(right, inputs, [grad.double() for grad in grads]),
        strict=True,
    ):
        assert_near(mine, true)


# Offsets beyond 2^31 --------------------------------------------------------------------------------------------------


def long(rows: int, size: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """bf16 (rows, size). The last row alone is written: of RAM what nobody touches takes none."""
    x = torch.empty(rows, size, dtype=torch.bfloat16, device=device)
    x[-1] = random(size, seed=seed).to(device)
    return x


def long_nf4(device: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of nf4_dequantize for a weight of more than 2^31 entries, and for its end alone, of one program."""
    entries = 64 * nf4_dequantize.SCALES_A_PROGRAM
    end = nf4_arguments(*nf4((1, entries), device=device), torch.bfloat16)
    size = 2**31 + entries
    arrays = {0: size // 2, 1: size // 64, 3: -(-size // 64 // 256)}  # packed values, scales, scales of scales
    values = list(end)
    for place, length in arrays.items():
        part = end[place].flatten()
        values[place] = torch.empty(length, dtype=part.dtype, device=device)
        values[place][-len(part) :] = part
    values[6] = (1, size)
    return tuple(values), end


def long_arguments(device: str) -> Iterator[tuple[Any, tuple[Any, ...], tuple[Any, ...]]]:
    """Of each operator: arguments with more than 2^31 entries, and those of their last row alone."""

    def cases() -> Iterator[tuple[Any, tuple[Any, ...]]]:
        width, inner, vocabulary = 4096, 14336, 128_256
        tokens, mlp_tokens, logit_rows = (2**31 // size + 2 for size in (width, inner, vocabulary))
        weight = random(width).bfloat16().to(device)
        states = [long(tokens, width, seed, device) for seed in range(3)]  # gradient, x, residual
        yield rms_norm.rms_norm_forward, (states[1], weight, EPS, False, states[2])
        for operator in (rms_norm.rms_norm_backward, rms_norm.rms_norm_backward_onto_):
            yield operator, (*states[:2], weight, EPS, states[2])
        del states
        rotation = [long(tokens, size, seed, device) for seed, size in enumerate((width, 1024, 128, 128))]
        for operator in (rope.rotate, rope.rotate_onto_):
            yield operator, (*rotation, False)
        del rotation
        mlp = [long(mlp_tokens, inner, seed, device) for seed in range(3)]  # gradient, gate, up
        for operator in (swiglu.swiglu, swiglu.swiglu_onto_):
            yield operator, tuple(mlp[1:])
        for operator in (swiglu.swiglu_backward_, swiglu.swiglu_backward_onto_):
            yield operator, tuple(mlp)
        del mlp
        targets = torch.full((logit_rows,), 7, device=device)
        yield cross_entropy.cross_entropy_, (long(logit_rows, vocabulary, device=device), targets, 1.0)

    for operator, values in cases():
        rows = len(values[0])
        yield operator, values, tuple(v[-1:].clone() if isinstance(v, Tensor) and len(v) == rows else v for v in values)
    yield nf4_dequantize.nf4_dequantize, *long_nf4(device)


def assert_same_end(operator: Any, run_long: Callable[..., Any], values: tuple[Any, ...], end: tuple[Any, ...]) -> None:
    """run_long: the operator's kernel for `values`. What it leaves at their end is what the kernel gives for `end`."""
    results = []
    for run, arguments in ((KERNELS[operator], end), (run_long, values)):
        returned = run(*arguments)
        schema = operator._schema.arguments
        written = [value for a, value in zip(schema, arguments, strict=False) if a.alias_info and a.alias_info.is_write]
        returned = returned if isinstance(returned, tuple) else [] if returned is None else [returned]
        results.append([*written, *returned])
    assert any(tensor.numel() > 2**31 for tensor in results[1])
    for small, large in zip(*results, strict=True):
        entries = min(swiglu.BLOCK, small.numel())  # of the last program, of any kernel
        assert torch.equal(large.flatten()[-entries:], small.flatten()[-entries:]), operator


@needs_triton
@interpreted
def test_every_kernel_is_right_beyond_2_to_the_31_entries(monkeypatch):
    """A row of 150,000 tokens has more at 14,336 a token. Of each kernel that there is the last program alone runs.

    Triton's interpreter computes in 32 bits what a card would, and raises where that overflows.
    """
    from triton.runtime import interpreter

    launched: set[str] = set()

    class LastProgram(interpreter.GridExecutor):
        def __init__(self, fn: Any, arg_names: Any, grid: tuple[int], *more: Any) -> None:
            super().__init__(fn, arg_names, (1,), *more)
            self.last = grid[0] - 1

        def __call__(self, *values: Any, **named: Any) -> None:
            launched.add(self.fn.__name__)
            builder = interpreter.interpreter_builder
            set_size, set_index = builder.set_grid_dim, builder.set_grid_idx
            with monkeypatch.context() as patch:
                patch.setattr(builder, "options", replace(builder.options, debug=True))  # an overflow raises
                patch.setattr(builder, "set_grid_dim", lambda *_: set_size(self.last + 1, 1, 1))
                patch.setattr(builder, "set_grid_idx", lambda *_: set_index(self.last, 0, 0))
                super().__call__(*values, **named)

    tested = set()
    for operator, values, end in long_arguments("cpu"):

        def run_last_program(*arguments: Any, kernel: Any = KERNELS[operator]) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(interpreter, "GridExecutor", LastProgram)
                return kernel(*arguments)

        assert_same_end(operator, run_last_program, values, end)
        tested.add(operator)
    assert tested == KERNELS.keys(), "an operator has no long arguments here"
    every = {
        name
        for module in pkgutil.iter_modules(kernels.__path__)
        for name, kernel in vars(importlib.import_module(f"common.kernels.{module.name}")).items()
        if isinstance(kernel, interpreter.InterpretedFunction)
    }
    assert launched == every, "no operator here launches a kernel"


COMPILE = """
import importlib
import pkgutil
import re
from itertools import product
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from common import kernels
from common.kernels import nf4_dequantize, swiglu

sizes = {"size": "i32", "eps": "fp32", "query_heads": "i32", "key_heads": "i32", "half": "i32"}
sizes |= {"packed_ptr": "*u8", "scales_ptr": "*u8"}
sizes |= dict.fromkeys(("code_ptr", "outer_scales_ptr", "outer_code_ptr", "offset_ptr"), "*fp32")
sizes |= {"scale": "fp32", "targets_ptr": "*i64", "nll_ptr": "*fp32"}
constants = {"HAS_RESIDUAL": True, "INVERSE": True, "BLOCK": 8192, "QUERY_BLOCK": 64, "KEY_BLOCK": 8, "HALF_BLOCK": 64}
constants |= {"SCALES": nf4_dequantize.SCALES_A_PROGRAM, "HAS_GRADIENT": True}
constants |= {"LINEAR": swiglu.LINEAR, "CUBIC": swiglu.CUBIC}
modules = [importlib.import_module("common.kernels." + m.name) for m in pkgutil.iter_modules(kernels.__path__)]
every = [kernel for m in modules for kernel in vars(m).values() if isinstance(kernel, triton.JITFunction)]
assert len(every) >= 7, every
for kernel in every:
    names = kernel.arg_names
    flags = {"ONE_PLUS", "GELU"} & set(names)  # Gemma's
    for capability, flag in product((75, 80, 86, 89, 90, 120), (False, True)[: len(flags) + 1]):
        known = {name: constants[name] for name in names if name in constants} | dict.fromkeys(flags, flag)
        dtype = "*bf16" if capability >= 80 else "*fp16"
        signature = {name: "constexpr" if name in known else sizes.get(name, dtype) for name in names}
        compiled = triton.compile(ASTSource(kernel, signature, known), GPUTarget("cuda", capability, 32),
                                  {"enable_fp_fusion": kernel is not nf4_dequantize._dequantize_kernel})
        assert compiled.asm["cubin"], (kernel, capability)
        # A row of 150,000 tokens has more than 2^31 entries of 14,336 a token: no offset is computed in 32 bits.
        for program in re.findall(r"(%\\w+) = tt.get_program_id", compiled.asm["ttir"]):
            uses = [line for line in compiled.asm["ttir"].splitlines() if re.search(program + r"\\b(?! = tt)", line)]
            assert uses and all("arith.extsi" in line and "to i64" in line for line in uses), (kernel, uses)
    print(len(flags) + 1, "forms")
"""


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_every_generation_of_cards(tmp_path):
    """From the RTX 20 to the RTX 50 series and H100, by Triton's own compiler and assembler: no GPU is needed."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("forms") >= 7
