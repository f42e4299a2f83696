"""Activation checkpointing: which layers throw their activations away and recompute them in backward.

Non-reentrant only (torch.utils.checkpoint, use_reentrant=False): the reentrant form loses gradients when no input
requires them, and cannot stop a recompute early. *Recompute* is activation checkpointing; a *checkpoint* is a file.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from common.recipe import Checkpointing

NON_REENTRANT = {"use_reentrant": False}
# What transformers calls it: "gradient_checkpointing" up to 5.17 at least, deprecated in 5.23.
_NAME = "activation_checkpointing"
if not hasattr(PreTrainedModel, f"{_NAME}_enable"):
    _NAME = "gradient_checkpointing"


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The model's repeated layers, in order. Raises ValueError when there is none that can recompute."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that supports activation checkpointing")
    return layers


def checkpoint_activations(model: PreTrainedModel | PeftModel, policy: Checkpointing) -> None:
    """Every decoder layer recomputes, or none does, as `policy` says; the model keeps no cache.

    Raises RuntimeError when a layer's setting is not what was asked for. `watch_recompute` tells what really happens.
    """
    model.config.use_cache = False  # training never reads it, and a recompute would fill it twice
    if policy == "none":
        getattr(model, f"{_NAME}_disable")()
    else:
        getattr(model, f"{_NAME}_enable")(dict(NON_REENTRANT))
    # The embedding is frozen: without this the first layer's input needs no gradient.
    model.enable_input_require_grads()
    for index, layer in enumerate(decoder_layers(model)):
        if layer.gradient_checkpointing != (policy == "every layer"):
            raise RuntimeError(f"layer {index}: recompute is {layer.gradient_checkpointing}, asked for {policy!r}")


def trainer_arguments(policy: Checkpointing) -> dict[str, Any]:
    """The same policy as the trainer's own arguments: it applies them again when training starts."""
    return {_NAME: policy != "none", f"{_NAME}_kwargs": dict(NON_REENTRANT)}


class RecomputeWatch:
    """Counts the micro-batches, how often each decoder layer ran, and how often with gradients switched off."""

    def __init__(self, layers: list[GradientCheckpointingLayer]) -> None:
        self.layers = layers
        self.micro_batches = 0
        self.runs: Counter[int] = Counter()
        self.runs_without_grad: Counter[int] = Counter()

    def verify(self, policy: Checkpointing) -> None:
        """Raises RuntimeError unless each layer ran forward once per micro-batch, and once more where it recomputes."""
        expected = self.micro_batches * (2 if policy == "every layer" else 1)
        for index in range(len(self.layers)):
            if self.runs[index] != expected:
                raise RuntimeError(
                    f"activation checkpointing is not in effect: layer {index} ran {self.runs[index]} times in "
                    f"{self.micro_batches} micro-batches, expected {expected} with policy {policy!r}"
                )
            if self.runs_without_grad[index]:
                raise RuntimeError(f"layer {index} ran without gradients: activation checkpointing is reentrant")


@contextmanager
def watch_recompute(model: PreTrainedModel | PeftModel) -> Iterator[RecomputeWatch]:
    """Watches the block: the embedding runs once per micro-batch, a layer's first norm once more in a recompute."""
    watch = RecomputeWatch(decoder_layers(model))

    def count_micro_batch(*_: Any) -> None:
        watch.micro_batches += 1

    def hook(index: int) -> Any:
        def count(*_: Any) -> None:
            watch.runs[index] += 1
            watch.runs_without_grad[index] += not torch.is_grad_enabled()

        return count

    handles = [
        layer.get_submodule("input_layernorm").register_forward_pre_hook(hook(index))
        for index, layer in enumerate(watch.layers)
    ]
    handles.append(model.get_input_embeddings().register_forward_pre_hook(count_micro_batch))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
