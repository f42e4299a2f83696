"""The bytes of one optimizer step, counted by running the step on fake tensors.

`count_step` runs the recipe's own step on a model of a few layers and writes down every allocation and release, in
segments: one a layer and direction, and what comes before, between and after. `common.plan.step.splice` repeats those
of the layers, which gives the step of the full model to the byte (tests/plan/test_forecast.py counts both).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from common.machine.collectives import local_tensor
from common.model.activation_checkpointing import decoder_layers
from common.plan.step import (
    ADAPTERS,
    EMBEDDINGS,
    GATHERED,
    GRADIENTS,
    KINDS,
    OPTIMIZER,
    SAVED,
    WEIGHTS,
    WORKING,
    Segment,
    Step,
    Work,
)

ALIGNMENT = 512  # bytes; torch's CUDA caching allocator rounds every block up to it (c10/cuda/CUDACachingAllocator.cpp)


def _varlen_scratch(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, *_: Any
) -> int:
    """Bytes that flash attention's backward allocates out of sight (torch, flash_attn/flash_api.cpp, mha_varlen_bwd):
    dq and one number a token and head in fp32, each example lengthened by 128 tokens, and with grouped heads dk and dv
    of every query head."""
    tokens, heads, dim = query.shape
    expanded = 2 * query.element_size() * tokens * heads * dim if key.shape[1] != heads else 0
    return 4 * (tokens + 128 * (len(starts) - 1)) * heads * (dim + 1) + expanded


def _varlen_flops(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _: Any, longest: int, *__: Any) -> int:
    """Causal attention over examples that fill their rows: half of 2 * 2 * tokens * longest * heads * dim."""
    tokens, heads, dim = query.shape
    return 2 * tokens * longest * heads * dim


# Scratch memory that an operator takes and gives back without the count seeing it, from its arguments, in bytes.
SCRATCH: dict[Any, Callable[..., int]] = {torch.ops.torch_attn._varlen_attn_backward.default: _varlen_scratch}
FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.linear.default: lambda inputs, weight, *_: 2 * inputs.numel() * len(weight),
    torch.ops.aten.addmm_.default: lambda _, a, b: 2 * a.numel() * b.shape[-1],
    torch.ops.torch_attn._varlen_attn.default: _varlen_flops,
    # five matmuls instead of two
    torch.ops.torch_attn._varlen_attn_backward.default: lambda grad, q, k, v, out, lse, starts, ends, longest, *rest: (
        5 * _varlen_flops(q, k, v, starts, ends, longest) // 2
    ),
}
# Operators that read and write nothing.
NO_TRAFFIC = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.detach.default,
}
_resize = torch.UntypedStorage.resize_
TO_HOST, TO_DEVICE = torch.ops.common.to_host.default, torch.ops.common.to_device.default


def _gemm_4bit(
    inputs: Tensor,
    weight: Tensor,
    shape: Any,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """What the operator does inside from 1,536 tokens on (bitsandbytes/backends/cuda/ops.py)."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        assert absmax_offset is not None
        absmax = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    dequantised = ops.dequantize_4bit(weight, absmax, blocksize, quant_type, shape, inputs.dtype)
    return torch.nn.functional.linear(inputs, dequantised, bias)


# Operators that allocate inside, and what stands for them in a count, where it sees what they do.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit}


class _Ledger(TorchDispatchMode):
    """Writes down each new storage and its end, and the work of each operator, under the name of the segment."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # storage -> number of its birth in `births`
        self.births: list[tuple[int, int]] = []  # segment, bytes
        self.events: list[tuple[int, int, int]] = []  # segment, birth, sign
        self.names: list[str] = []
        self.work: list[Work] = []
        self.host: dict[int, int] = {}  # storage in host memory -> bytes
        self.host_bytes: list[int] = []
        self.kinds: dict[int, str] = {}  # birth -> kind, where it is known
        self.known: set[int] = set()  # storages that were there before
        for tensor in known:
            storage = tensor.untyped_storage()
            self.known.add(storage._cdata)
            weakref.finalize(storage, self.known.discard, storage._cdata)
        self.begin("embedding")

    def begin(self, name: str) -> None:
        self.names.append(name)
        self.work.append(Work())
        self.host_bytes.append(0)

    def tag(self, tensor: Tensor, kind: str) -> None:
        """What the tensor's storage is there for, if it was allocated in this step."""
        birth = self.alive.get(local_tensor(tensor).untyped_storage()._cdata)
        if birth is not None:
            self.kinds[birth] = kind

    def allocate(self, tensor: Tensor) -> None:
        storage = local_tensor(tensor).untyped_storage()
        key = storage._cdata
        if key in self.alive or key in self.known or key in self.host:
            return
        self._begin_life(storage)
        weakref.finalize(storage, self._release, key)

    def _begin_life(self, storage: torch.UntypedStorage) -> int:
        birth = len(self.births)
        self.births.append((len(self.names) - 1, round_up(storage.nbytes())))
        self.alive[storage._cdata] = birth
        self.events.append((len(self.names) - 1, birth, 1))
        return birth

    def _release(self, key: int) -> None:
        birth = self.alive.pop(key, None)
        if birth is not None:
            self.events.append((len(self.names) - 1, birth, -1))

    def resize(self, storage: torch.UntypedStorage, size: int) -> Any:
        """Stands for `UntypedStorage.resize_`, with which FSDP2 frees a gathered layer and allocates it again."""
        if (birth := self.alive.get(storage._cdata)) is not None:
            self.kinds[birth] = GATHERED
        self._release(storage._cdata)
        resized = _resize(storage, size)
        if size:
            self.kinds[self._begin_life(storage)] = GATHERED
        return resized

    def _keep_on_host(self, tensor: Tensor) -> None:
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        self.host[key] = size
        self.host_bytes[-1] += size
        weakref.finalize(tensor.untyped_storage(), self._leave_host, key)

    def _leave_host(self, key: int) -> None:
        self.host_bytes[-1] -= self.host.pop(key)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[operator](*args, **kwargs)
        outputs = operator(*args, **kwargs)
        if operator.namespace == "prim":  # questions about a tensor
            return outputs
        produced = [outputs] if isinstance(outputs, Tensor) else _tensors_in(outputs)
        work = self.work[-1]
        if operator in (TO_HOST, TO_DEVICE):
            work.link_bytes += sum(tensor.nbytes for tensor in produced)
        if operator is TO_HOST:
            self._keep_on_host(produced[0])
            return outputs
        for tensor in produced:
            self.allocate(tensor)
        if operator.namespace == "c10d":
            self._communicate(operator, *args[:2])
            return outputs
        if operator in SCRATCH:
            self._scratch(round_up(SCRATCH[operator](*args, **kwargs)))
        if operator not in NO_TRAFFIC and not operator.is_view:
            consumed = _tensors_in((args, kwargs))
            flops = 0.0
            if operator in FLOPS:
                flops = FLOPS[operator](*args, **kwargs)
            elif operator._overloadpacket in flop_registry:
                flops = flop_registry[operator._overloadpacket](*args, **kwargs, out_val=outputs)
            work.operators.append((flops, sum(tensor.nbytes for tensor in consumed + produced)))
            work.launches += 1
        return outputs

    def _communicate(self, operator: Any, output: Any, inputs: Any) -> None:
        """What a layer is gathered into, and what its gradients become, which each process has a part of."""
        outputs, sent = sum(t.nbytes for t in _tensors_in(output)), sum(t.nbytes for t in _tensors_in(inputs))
        self.work[-1].link_bytes += abs(outputs - sent)
        for tensor in _tensors_in(output):
            self.tag(tensor, GATHERED if outputs > sent else GRADIENTS)

    def _scratch(self, size: int) -> None:
        segment, birth = len(self.names) - 1, len(self.births)
        self.births.append((segment, size))
        self.events += [(segment, birth, 1), (segment, birth, -1)]

    def segments(self) -> tuple[Segment, ...]:
        ended = {birth: segment for segment, birth, sign in self.events if sign < 0}
        for birth, (segment, _) in enumerate(self.births):
            outlives = ended.get(birth) != segment
            forward = self.names[segment].startswith(("forward", "embedding", "head"))
            self.kinds.setdefault(birth, SAVED if outlives and forward else WORKING)
        events: list[list[tuple[str, int, str]]] = [[] for _ in self.names]
        for segment, birth, sign in self.events:
            born, size = self.births[birth]
            events[segment].append((self.kinds[birth], sign * size, self.names[born]))
        parts = zip(self.names, events, self.work, self.host_bytes, strict=True)
        return tuple(Segment(name, tuple(deltas), work, host) for name, deltas, work, host in parts)


def _tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@contextmanager
def _segments_of_layers(model: nn.Module, ledger: _Ledger) -> Iterator[None]:
    """A segment begins where a layer is entered, and where the gradient of its output is complete."""
    layers = decoder_layers(model)
    in_backward = False

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not in_backward:  # not in a recompute
                ledger.begin(f"forward {index}")

        return hook

    def leave(index: int) -> Callable[..., None]:
        def begin_backward(_: Tensor) -> None:
            nonlocal in_backward
            in_backward = True
            ledger.begin(f"backward {index}")

        def hook(_: Any, __: Any, output: Any) -> None:
            if not in_backward:
                (output if isinstance(output, Tensor) else output[0]).register_hook(begin_backward)
                if index == len(layers) - 1:
                    ledger.begin("head and loss")

        return hook

    # Before the hooks of FSDP2, so that a segment holds the gathering of its layer.
    handles = [layer.register_forward_pre_hook(enter(i), prepend=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave(i), prepend=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    accumulates: bool,
    max_grad_norm: float | None = None,
) -> Step:
    """The last micro-batch of an optimizer step, on fake tensors, with optimizer states already there.

    loss: runs the forward pass. accumulates: gradients of earlier micro-batches are there when it begins. Call it under
    the FakeTensorMode that the model was made in.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _allocate_optimizer_states(trained, optimizer)
    if accumulates:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    outside, of_layer, known = _standing(model, optimizer)
    cut = _sum_by_kind(
        part for part in _tensors_of(decoder_layers(model)[0], optimizer) if isinstance(part[0], DTensor)
    )
    ledger = _Ledger(known)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: ledger.tag(p.grad, GRADIENTS)) for p in trained]
    resize = patch.object(torch.UntypedStorage, "resize_", lambda storage, size: ledger.resize(storage, size))
    with ledger, resize, _segments_of_layers(model, ledger):
        value = loss()
        ledger.begin("loss")
        value.backward()
        del value
        ledger.begin("optimizer")
        if any(cut.values()):
            torch.nn.utils.get_total_norm([local_tensor(p.grad) for p in trained if p.grad is not None])
        elif max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        if not isinstance(optimizer, Optimizer8bit):  # which reads numbers, updates in place and allocates nothing
            optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return Step(outside, of_layer, len(decoder_layers(model)), ledger.segments(), cut)


def _allocate_optimizer_states(trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, Optimizer8bit):
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, group_index, index)
        return
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _standing(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, int], dict[str, int], list[Tensor]]:
    """What is there before the step: bytes of each kind outside the layers and in one layer, and the tensors."""
    layers = decoder_layers(model)
    everything, in_first = list(_tensors_of(model, optimizer)), list(_tensors_of(layers[0], optimizer))
    if len(layers) > 1:  # what layers share is outside them: the tables of an 8-bit optimizer
        in_last = {local_tensor(tensor).untyped_storage()._cdata for tensor, _ in _tensors_of(layers[-1], optimizer)}
        in_first = [part for part in in_first if local_tensor(part[0]).untyped_storage()._cdata not in in_last]
    total, of_layer = _sum_by_kind(everything), _sum_by_kind(in_first)
    outside = {kind: total[kind] - len(layers) * of_layer[kind] for kind in KINDS}
    return outside, of_layer, [local_tensor(tensor) for tensor, _ in everything]


def _tensors_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str]]:
    """Every tensor that stands for the module between two steps, and its kind."""
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel | PeftModel) else None
    for child in module.modules():
        for buffer in child.buffers(recurse=False):
            yield buffer, EMBEDDINGS
        for parameter in child.parameters(recurse=False):
            if parameter.requires_grad:
                yield parameter, ADAPTERS
                if parameter.grad is not None:
                    yield parameter.grad, GRADIENTS
                for state in optimizer.state[parameter].values():
                    if isinstance(state, Tensor):
                        yield state, OPTIMIZER
            elif isinstance(child, nn.Linear) and child is not head and parameter is child.weight:
                for tensor in quantised_tensors(child):
                    yield tensor, WEIGHTS
            else:
                yield parameter, EMBEDDINGS


def quantised_tensors(linear: nn.Linear) -> Iterator[Tensor]:
    """The tensors that a weight takes memory with: of a 4-bit one its packed values, scales and code books too."""
    yield linear.weight
    state = getattr(linear, "quant_state", None) or getattr(linear.weight, "quant_state", None)
    while state is not None:
        yield from (tensor for tensor in (state.absmax, state.code, state.offset) if isinstance(tensor, Tensor))
        state = state.state2


def _sum_by_kind(tensors: Iterable[tuple[Tensor, str]]) -> dict[str, int]:
    """Bytes of the storages behind the tensors, each once, rounded as the allocator does."""
    total, seen = dict.fromkeys(KINDS, 0), set()
    for tensor, kind in tensors:
        storage = local_tensor(tensor).untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total[kind] += round_up(storage.nbytes())
    return total
