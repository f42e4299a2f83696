"""Attaches LoRA adapters with PEFT."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.recipe import LoraSpec, UserError


def attach_lora(model: PreTrainedModel, spec: LoraSpec, seed: int = 0) -> PeftModel:
    """Puts fp32 adapters on every target module; nothing else is trainable.

    A starts from Kaiming-uniform noise, B from zero, so the model's outputs are unchanged until the first step. The
    noise is drawn from torch's global generator, which is seeded with `seed`. Raises UserError when the model has no
    module of a target's name, and when a target is the head.
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
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=list(spec.target_modules),
        bias="none",
    )
    torch.manual_seed(seed)
    # fp32: in bf16 half of lora_A does not move at all in 100 steps at 2e-5, because updates are rounded away.
    peft_model = get_peft_model(
        model, config, autocast_adapter_dtype=True, low_cpu_mem_usage=model.device.type == "meta"
    )
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise RuntimeError(f"{name} is {parameter.dtype}; adapters are trained in fp32")
    return peft_model


def unmoved_adapters(adapter: dict[str, Tensor]) -> list[str]:
    """Names of the B matrices that are still zero, as attach_lora made them: such an adapter changes nothing.

    adapter: tensors by name.
    """
    return [name for name, tensor in adapter.items() if "lora_B" in name and not tensor.any()]


def trainable_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
