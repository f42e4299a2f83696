"""Decoder layers sharded over the cards of a run with PyTorch's FSDP2.

Each card holds a shard of every layer. For its computation a layer is all-gathered, and the next one while it computes.

What is outside the layers (embedding, head, norm) stays whole on each card: gathering it would take twice its memory at
the worst moment. The scales of 4-bit weights stay whole too, because they are no parameters. The adapters are sharded
with their layers, and so are their gradients and the optimizer's states.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from common.machine.collectives import all_reduce_sum, full_tensor, local_tensor, world_mesh
from common.machine.device import GIB, peak_ram, this_machine
from common.machine.host_memory import page_locked
from common.machine.layout import Layout, spread_layers
from common.machine.out_of_memory import allocating_on_host
from common.machine.slow_work import report_slow_work
from common.model.activation_checkpointing import decoder_layers
from common.model.hollow_model import fill_layer, planned_layout, take_layer_weights
from common.recipe import LoraSpec, TrainSpec, require

ADAPTER_NAME = "default"  # that PEFT gives the adapter, and leaves out in its files


def refuse_unshardable(lora: LoraSpec, train: TrainSpec) -> None:
    """Raises UserError for settings that do not work with sharded layers."""
    require(not lora.dora, "LoraSpec.dora reads whole weights, which sharded layers do not have: use plain LoRA")
    require(
        "8bit" not in train.optimizer,
        f"TrainSpec.optimizer={train.optimizer!r} cannot update sharded adapters: take 'adamw_torch_fused', whose "
        "states are shared out over the cards",
    )


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def shard_layers(model: PeftModel, layout: Layout) -> None:
    """Reads the weights of the decoder layers, and shards each layer as soon as it has them.

    model: from `load_4bit` with the same layout, which leaves the layers without weights (common.model.hollow_model).
    Does nothing for a layout that does not shard, and for layers that are sharded. Each machine reads and quantizes a
    weight once, for all of its cards.
    Raises UserError when the weights are damaged or others than the config says.
    """
    if not layout.sharded or is_sharded(model):
        return
    base, machine = model.get_base_model(), this_machine()
    weights = take_layer_weights(base)
    names = {module: name for name, module in base.named_modules()}
    mesh = world_mesh(machine.device.type)
    layers = decoder_layers(model)
    on_host = spread_layers(layout.on_host, len(layers))
    with report_slow_work("reading and sharding", len(layers), "layers") as work:
        for index, layer in enumerate(layers):
            fill_layer(layer, names[layer], weights)
            shard_layer(layer, mesh, on_host=index in on_host)
            work.done += 1
    base.is_loaded_in_4bit = False  # TRL would cast the adapters of a 4-bit model to bf16
    shard_root(model, mesh)
    local = sum(part.nbytes for part in map(local_tensor, model.parameters()) if part.device == machine.device)
    print(
        f"weights: read once on each machine; {local / GIB:.2f} GiB on each card, "
        f"{peak_ram() / GIB:.2f} GiB of host memory at most so far"
    )


def shard_empty_layers(model: nn.Module) -> None:
    """shard_layers, as load_4bit's layout said, where the layers have no weights yet: before a run the model answers.

    Does nothing for any other model. All processes must call it.
    """
    if isinstance(model, PeftModel) and (layout := planned_layout(model.get_base_model())):
        shard_layers(model, layout)


@contextmanager
def without_fsdp_classes(model: nn.Module) -> Iterator[None]:
    """In the block each sharded module has the class that it had before; then FSDP2's subclass of the one it has now.

    fully_shard gives a module a class made of FSDPModule and the module's own, torch 2.13 _fully_shard/_fsdp_init.py.
    """
    sharded = {module: type(module) for module in model.modules() if isinstance(module, FSDPModule)}
    for module, fsdp_class in sharded.items():
        module.__class__ = fsdp_class.__mro__[fsdp_class._orig_cls_mro_index]
    yield
    for module, fsdp_class in sharded.items():
        if module.__class__ is not fsdp_class.__mro__[fsdp_class._orig_cls_mro_index]:
            own = {"__deepcopy__": vars(fsdp_class)["__deepcopy__"]}
            fsdp_class = type(f"FSDP{type(module).__name__}", (FSDPModule, type(module)), own)
        module.__class__ = fsdp_class


def shard_layer(layer: nn.Module, mesh: DeviceMesh, *, on_host: bool = False) -> None:
    """Applies FSDP2's fully_shard to one decoder layer. on_host keeps its shards in host memory.

    It is page-locked where there is a GPU and the system allows it.
    """
    policy = OffloadPolicy()
    with allocating_on_host() if on_host else nullcontext():
        if on_host:
            size = sum(parameter.nbytes for parameter in layer.parameters()) // mesh.size()
            policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda" and page_locked(size).is_pinned())
        fully_shard(layer, mesh=mesh, offload_policy=policy)


def shard_root(model: PeftModel, mesh: DeviceMesh) -> None:
    """Applies fully_shard to the model around its sharded layers, so that forward and `generate` gather each in turn.

    The parameters outside the layers are left out, and stay whole on each card.
    """
    in_layers = {parameter for layer in decoder_layers(model) for parameter in layer.parameters()}
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p not in in_layers})
    register_fsdp_forward_method(model, "generate")


def copy_to_local_shard(value: Tensor, into: Tensor) -> None:
    """Copies this process's shard of `value`, a full tensor, to `into`; all of it where `into` is not sharded."""
    if isinstance(into, DTensor):  # FSDP2 shards along the first dimension, as torch.chunk does
        chunks, place = value.chunk(into.device_mesh.size()), into.device_mesh.get_local_rank()
        value = chunks[place] if place < len(chunks) else value[:0]
    local_tensor(into).copy_(value)


def gather_adapter(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's full tensors by name, on the CPU. All processes must call it."""
    return {name: full_tensor(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_adapter_shards(model: PeftModel, file: Path) -> None:
    """Copies an adapter file into the model, each process its shards of it."""
    stored = load_file(file)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            copy_to_local_shard(stored[name.replace(f".{ADAPTER_NAME}.", ".")], parameter)


def gather_states_when_saved(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's state_dict that of a run on one card: full tensors when saved, sharded again when loaded.

    All processes must call state_dict.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def gather(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        states = {
            index: {key: full_tensor(value) if isinstance(value, Tensor) else value for key, value in state.items()}
            for index, state in saved["state"].items()
        }
        return saved | {"state": states}

    def shard_again(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        states = {
            index: {key: _shard_like(parameters[index], value) for key, value in state.items()}
            for index, state in saved["state"].items()
        }
        return saved | {"state": states}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(shard_again)


def _shard_like(parameter: Tensor, value: Any) -> Any:
    """A full state of a parameter, sharded like it; other values, such as the number of steps, as they are."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    local = torch.empty_like(parameter, dtype=value.dtype)
    copy_to_local_shard(value, local)
    return local


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients so that their norm over all cards is at most `max_norm`; returns the norm before that."""
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    own = torch.nn.utils.get_total_norm(gradients)
    (square,) = all_reduce_sum([float(own) ** 2])
    norm = math.sqrt(square) if math.isfinite(square) else math.nan
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return torch.tensor(norm, device=own.device)
