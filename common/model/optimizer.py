"""Builds a recipe's optimizer, for the run and for the plan."""

from typing import Any

import bitsandbytes
import torch
from torch import nn

from common.recipe import TrainSpec


def build_optimizer(model: nn.Module, train: TrainSpec) -> torch.optim.Optimizer:
    """AdamW for the trainable parameters (adapters, fp32), with betas and epsilon of its paper, arXiv:1711.05101."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values: dict[str, Any] = {
        "lr": train.learning_rate,
        "weight_decay": train.weight_decay,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
    }
    match train.optimizer:
        case "adamw_8bit":
            return bitsandbytes.optim.AdamW8bit(parameters, **values)
        case "paged_adamw_8bit":
            return bitsandbytes.optim.PagedAdamW8bit(parameters, **values)
        case _:
            fused = train.optimizer == "adamw_torch_fused"
            return torch.optim.AdamW(parameters, fused=fused, foreach=not fused, **values)
