"""Attaches LoRA adapters with PEFT."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.model.adapter_config import ScaledLoraConfig
from common.model.start_adapter import StartedFrom, digest_of, load_start_adapter
from common.model.weight_streaming import compute_magnitudes
from common.recipe import LoraSpec, UserError


def attach_lora(model: PreTrainedModel, spec: LoraSpec, seed: int = 0) -> PeftModel:
    """Puts fp32 adapters on every target module; nothing else is trainable.

    A starts from Kaiming-uniform noise, B from zero, so the model's outputs are unchanged until the first step. The
    noise is drawn from torch's global generator, which is seeded with `seed`. With `spec.start_from` both then become
    those of that adapter. Raises UserError when the model has no module of a target's name, when a target is the head,
    and as load_start_adapter.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [target for target in spec.target_modules if target not in names]
    if missing:
        raise UserError(
            f"LoraSpec.target_modules names {', '.join(missing)}, which this model does not have; "
            f"its linear modules are {', '.join(sorted(names))}"
        )
    head = model.get_output_embeddings()
    if any(module is head and name.rsplit(".", 1)[-1] in spec.target_modules for name, module in model.named_modules()):
        raise UserError("LoraSpec.target_modules names the head, which the loss reads without an adapter; leave it out")
    values: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "target_modules": list(spec.target_modules),
        "bias": "none",
    }
    scaling = getattr(model, "scaled_rope", None)  # of load_4bit
    config = LoraConfig(**values) if scaling is None else ScaledLoraConfig(**values, rope_scaling=scaling)
    torch.manual_seed(seed)
    # fp32: in bf16 half of lora_A does not move at all in 100 steps at 2e-5, because updates are rounded away.
    peft_model = get_peft_model(
        model, config, autocast_adapter_dtype=True, low_cpu_mem_usage=model.device.type == "meta"
    )
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise RuntimeError(f"{name} is {parameter.dtype}; adapters are trained in fp32")
    compute_magnitudes(peft_model)
    load_start_adapter(peft_model, spec)
    return peft_model


def unmoved_adapters(adapter: dict[str, Tensor], start: StartedFrom | None = None) -> list[str]:
    """Names of the B matrices of the linear layers that have learnt nothing since attach_lora made their adapters.

    adapter: tensors by name. A new adapter whose B is still zero changes nothing. One that started from another
    (`start`) has learnt nothing where no tensor of the layer has moved.
    """
    names = [name for name in adapter if "lora_B" in name]
    if start is None:
        return [name for name in names if not adapter[name].any()]
    moved = {_layer_of(name) for name, tensor in adapter.items() if digest_of(tensor) != start.digests[name]}
    return [name for name in names if _layer_of(name) not in moved]


def _layer_of(name: str) -> str:
    """The linear layer of an adapter's tensor."""
    return name.split(".lora_")[0]


def trainable_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
