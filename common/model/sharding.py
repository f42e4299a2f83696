"""Decoder layers cut over the cards of a run by PyTorch's FSDP2: each card holds a part of every layer, and has the
whole of the one that computes and of the next, gathered from all.

What is outside the layers (embedding, head, norm) stays whole on each card: gathering it would take twice its memory at
the worst moment. So do the scales of 4-bit weights, which are no parameters. The adapters are cut with their layers,
and with them their gradients and the optimizer's states.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
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
from common.machine.layout import Layout
from common.machine.shared_memory import read_once_per_machine
from common.model.activation_checkpointing import decoder_layers
from common.model.base_weights import BaseWeights, state_of
from common.recipe import LoraSpec, TrainSpec, require

ADAPTER = "default"  # PEFT's name of the one that is trained


def refuse_unshardable(lora: LoraSpec, train: TrainSpec) -> None:
    """Raises UserError for what does not work on layers that are cut into parts."""
    require(not lora.dora, "LoraSpec.dora reads whole weights, which sharded layers do not have: use plain LoRA")
    require(
        "8bit" not in train.optimizer,
        f"TrainSpec.optimizer={train.optimizer!r} cannot update sharded adapters: take 'adamw_torch_fused', whose "
        "states are shared out over the cards",
    )


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def shard_layers(model: PeftModel, layout: Layout) -> None:
    """The layers of a model that `load_4bit` left hollow are filled, and each is cut over the cards as soon as it is.

    Nothing for a layout that does not shard. Each machine reads and quantises a weight once, for all of its cards.
    Raises UserError when the weights are damaged or others than the config says.
    """
    if not layout.sharded:
        return
    base, machine = model.get_base_model(), this_machine()
    names = {module: name for name, module in base.named_modules()}
    mesh = world_mesh(machine.device.type)
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        fill_layer(layer, names[layer], base.base_weights)
        # Spread over the model, so that one layer comes from the host while others compute.
        on_host = (index + 1) * layout.on_host // len(layers) > index * layout.on_host // len(layers)
        shard_layer(layer, mesh, on_host=on_host)
    del base.base_weights
    base.is_loaded_in_4bit = False  # TRL would cast what is trained of such a model to bf16
    shard_root(model, mesh)
    parts = sum(part.nbytes for part in map(local_tensor, model.parameters()) if part.device == machine.device)
    print(
        f"weights: read once on each machine; {parts / GIB:.2f} GiB on each card, "
        f"{peak_ram() / GIB:.2f} GiB of host memory at most so far"
    )


def fill_layer(layer: nn.Module, prefix: str, weights: BaseWeights) -> None:
    """The layer's weights are on the machine's device; `prefix` is its name in the checkpoint."""
    device = weights.machine.device
    for path, module in layer.named_modules():
        name = ".".join(part for part in (prefix, path) if part).replace(".base_layer", "")  # PEFT's
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                continue
            if isinstance(module, Linear4bit) and key == "weight":
                shape = torch.Size((module.out_features, module.in_features))
                packed, *scales = read_once_per_machine(device, weights.in_4_bit, f"{name}.weight", shape)
                # FSDP2 could cut bytes too; bitsandbytes reads a gathered weight in the dtype of the model only.
                value, module.quant_state = packed.flatten().view(module.quant_storage)[:, None], state_of(scales)
            else:
                (value,) = read_once_per_machine(device, weights.in_16_bit, f"{name}.{key}", parameter.shape)
            setattr(module, key, nn.Parameter(value, requires_grad=False))


def shard_layer(layer: nn.Module, mesh: DeviceMesh, *, on_host: bool = False) -> None:
    """Of the layer's parameters only this process's part stays, on the card or in host memory."""
    host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    fully_shard(layer, mesh=mesh, offload_policy=host if on_host else OffloadPolicy())


def shard_root(model: PeftModel, mesh: DeviceMesh) -> None:
    """The model's forward pass, and `generate`, gather each cut layer in turn; what is outside them stays whole."""
    inside = {parameter for layer in decoder_layers(model) for parameter in layer.parameters()}
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p not in inside})
    register_fsdp_forward_method(model, "generate")


def copy_to_local_shard(value: Tensor, into: Tensor) -> None:
    """Of a whole value, which each process has, this process's part is in `into`, cut or not."""
    if isinstance(into, DTensor):  # FSDP2 cuts along the first dimension, as chunk does
        chunks, place = value.chunk(into.device_mesh.size()), into.device_mesh.get_local_rank()
        value = chunks[place] if place < len(chunks) else value[:0]
    local_tensor(into).copy_(value)


def gather_adapter(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by name, whole, on the CPU; all processes must ask."""
    return {name: full_tensor(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_adapter_shards(model: PeftModel, file: Path) -> None:
    """The adapter is what the file of an adapter holds, each process with its part of it."""
    stored = load_file(file)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            copy_to_local_shard(stored[name.replace(f".{ADAPTER}.", ".")], parameter)


def gather_states_when_saved(optimizer: torch.optim.Optimizer) -> None:
    """Its state_dict, which all processes must ask for, is that of a run on one card, and it reads such a one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def gather(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        states = {
            index: {key: full_tensor(value) if isinstance(value, Tensor) else value for key, value in state.items()}
            for index, state in saved["state"].items()
        }
        return saved | {"state": states}

    def cut_states(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        states = {
            index: {key: _cut_like(parameters[index], value) for key, value in state.items()}
            for index, state in saved["state"].items()
        }
        return saved | {"state": states}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(cut_states)


def _cut_like(parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:  # the number of steps
        return value
    mine = torch.empty_like(parameter, dtype=value.dtype)
    copy_to_local_shard(value, mine)
    return mine


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """The norm of all gradients, over all cards, before they are scaled to `max_norm` at most."""
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    own = torch.nn.utils.get_total_norm(gradients)
    (square,) = all_reduce_sum([float(own) ** 2])
    norm = math.sqrt(square) if math.isfinite(square) else math.nan
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return torch.tensor(norm, device=own.device)
