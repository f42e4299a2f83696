"""The memory that a model and its optimizer take between two steps, by kind and rounded as torch's allocator does."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from common.machine.collectives import local_tensor
from common.machine.host_memory import page_locked_bytes
from common.model.activation_checkpointing import decoder_layers
from common.model.held_adapters import HeldAdapters
from common.model.weight_streaming import streamed_tensors
from common.plan.ledger import round_up
from common.plan.step import ADAPTERS, EMBEDDINGS, GRADIENTS, KINDS, OPTIMIZER, WEIGHTS


@dataclass(frozen=True)
class ResidentMemory:
    """What stays in memory between two steps. Bytes of each kind."""

    outside_layers: dict[str, int]
    per_layer: dict[str, int]
    sharded_per_layer: dict[str, int]  # of per_layer, this card's shards
    shard_on_host: int  # bytes that the shards of a layer take in host memory instead
    streamed_per_layer: int  # of per_layer's weights, what can wait in host memory (common.model.weight_streaming)
    tensors: list[Tensor]  # all of them; of sharded ones the local tensor


def find_resident_memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> ResidentMemory:
    """Finds the tensors of the model, its gradients and its optimizer states, and adds them up.

    The first layer stands for every layer. What layers share counts outside them: the tables of an 8-bit optimizer.
    """
    layers = decoder_layers(model)
    everything, in_first = list(_tensors_of(model, optimizer)), list(_tensors_of(layers[0], optimizer))
    sharded = [pair for pair in in_first if isinstance(pair[0], DTensor)]
    if len(layers) > 1:
        in_last = {_storage_key(tensor) for tensor, _ in _tensors_of(layers[-1], optimizer)}
        in_first = [pair for pair in in_first if _storage_key(pair[0]) not in in_last]
    total, per_layer = _sum_by_kind(everything), _sum_by_kind(in_first)
    outside = {kind: total[kind] - len(layers) * per_layer[kind] for kind in KINDS}
    return ResidentMemory(
        outside,
        per_layer,
        _sum_by_kind(sharded),
        sum(_bytes_on_host(tensor, kind) for tensor, kind in sharded),
        0 if sharded else streamed_tensors(layers[0])[1],
        [local_tensor(tensor) for tensor, _ in everything],
    )


def _bytes_on_host(shard: Tensor, kind: str) -> int:
    """Bytes that a shard takes in host memory under FSDP2's CPUOffloadPolicy: parameters and gradients are page-locked.

    Gradients count with their adapters, whether they are there already or not. Optimizer states are ordinary memory.
    """
    size = local_tensor(shard).untyped_storage().nbytes()
    if kind == GRADIENTS:
        return 0
    return size if kind == OPTIMIZER else page_locked_bytes(size) * (2 if kind == ADAPTERS else 1)


def _tensors_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str]]:
    """Yields every tensor of the module that stays between two steps, with its kind."""
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
                for tensor in weight_tensors(child):
                    yield tensor, WEIGHTS
            else:
                yield parameter, EMBEDDINGS
        if isinstance(held := getattr(child, "held", None), HeldAdapters):
            for copy in held.tensors(child):
                yield copy, ADAPTERS


def weight_tensors(linear: nn.Linear) -> Iterator[Tensor]:
    """Yields the tensors that make up a weight: of a 4-bit one its packed values, its scales and its code books."""
    yield linear.weight
    state = getattr(linear, "quant_state", None) or getattr(linear.weight, "quant_state", None)
    while state is not None:
        yield from (tensor for tensor in (state.absmax, state.code, state.offset) if isinstance(tensor, Tensor))
        state = state.state2


def _sum_by_kind(tensors: Iterable[tuple[Tensor, str]]) -> dict[str, int]:
    """Bytes of the storages behind the tensors, by kind. Each storage counts once, rounded up."""
    total, seen = dict.fromkeys(KINDS, 0), set()
    for tensor, kind in tensors:
        key = _storage_key(tensor)
        if key not in seen:
            seen.add(key)
            total[kind] += round_up(local_tensor(tensor).untyped_storage().nbytes())
    return total


def _storage_key(tensor: Tensor) -> int:
    return local_tensor(tensor).untyped_storage()._cdata
