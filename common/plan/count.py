"""Counts the bytes of one optimizer step by running the step on fake tensors.

`count_step` runs the recipe's own step on a model of a few layers. The ledger writes down every allocation and release,
in segments: one a layer and direction, and one for what comes before, between and after the layers. `splice_layers`
(common.plan.splice) repeats the segments of the layers. That gives the step of the full model to the byte;
tests/plan/test_forecast.py counts both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.kernels import tiles
from common.machine.collectives import local_tensor
from common.model.activation_checkpointing import decoder_layers
from common.model.held_adapters import held_adapters
from common.model.lean_layers import copy_all_adapters
from common.plan.ledger import Ledger
from common.plan.resident import ResidentMemory, find_resident_memory
from common.plan.step import ADAPTERS, GRADIENTS, Step


def count_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    accumulates: bool,
    max_grad_norm: float | None = None,
    references: bool = False,
) -> Step:
    """Counts the last micro-batch of an optimizer step and the optimizer's update. The optimizer states exist already.

    loss: runs the forward pass. accumulates: gradients of earlier micro-batches exist when it begins. references: the
    operators of common.kernels run as their references, not as kernels. Call it under the FakeTensorMode that the model
    was made in.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _allocate_optimizer_states(trained, optimizer)
    if accumulates:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    held, sharded = held_adapters(model), any(isinstance(parameter, DTensor) for parameter in trained)
    held.hold(copies=not sharded)  # as the trainer
    if accumulates and not sharded:  # earlier micro-batches have made them
        copy_all_adapters(model, next(model.parameters()).dtype)  # the embedding's
    resident = find_resident_memory(model, optimizer)
    ledger = Ledger(resident.tensors, references=references)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: ledger.set_kind(p.grad, GRADIENTS)) for p in trained]
    split = patch.object(tiles, "split", ledger.split)
    with ledger, _resized_in(ledger), split, _segments_of_layers(model, ledger):
        value = loss()
        for copy in held.tensors():
            ledger.set_kind(copy, ADAPTERS)
        ledger.begin_segment("loss")
        value.backward()
        del value
        ledger.begin_segment("optimizer")
        held.release()
        if sharded:
            torch.nn.utils.get_total_norm([local_tensor(p.grad) for p in trained if p.grad is not None])
        elif max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        if not isinstance(optimizer, Optimizer8bit):  # it would read values; it updates in place and allocates nothing
            optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return _step_of(model, resident, ledger)


def count_forward(
    model: nn.Module, forward: Callable[[], Any], optimizer: torch.optim.Optimizer, *, references: bool = False
) -> Step:
    """Counts a forward pass without gradients, in evaluation mode: a step without the segments of its backward pass.

    Gradients and optimizer states exist, as they would in the middle of a run. Arguments as those of count_step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _allocate_optimizer_states(trained, optimizer)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    model.eval()
    resident = find_resident_memory(model, optimizer)
    ledger = Ledger(resident.tensors, references=references)
    with ledger, _resized_in(ledger), torch.no_grad(), _segments_of_layers(model, ledger):
        forward()
    return _step_of(model, resident, ledger)


def _step_of(model: nn.Module, resident: ResidentMemory, ledger: Ledger) -> Step:
    return Step(
        resident.outside_layers,
        resident.per_layer,
        len(decoder_layers(model)),
        ledger.segments(),
        resident.sharded_per_layer,
        resident.shard_on_host,
        resident.streamed_per_layer,
        resident.streamed_per_layer,
    )


def _resized_in(ledger: Ledger) -> Any:
    return patch.object(torch.UntypedStorage, "resize_", lambda storage, size: ledger.resize(storage, size))


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


@contextmanager
def _segments_of_layers(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Begins a segment where a layer is entered, and where the gradient of its output is complete."""
    layers = decoder_layers(model)
    in_backward = False

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not in_backward:  # else it is a recompute
                ledger.begin_segment(f"forward {index}")

        return hook

    def leave(index: int) -> Callable[..., None]:
        def begin_backward(_: Tensor) -> None:
            nonlocal in_backward
            in_backward = True
            ledger.begin_segment(f"backward {index}")

        def hook(_: Any, __: Any, output: Any) -> None:
            if not in_backward:
                output = output if isinstance(output, Tensor) else output[0]
                if output.requires_grad:
                    output.register_hook(begin_backward)
                if index == len(layers) - 1:
                    ledger.begin_segment("head and loss")

        return hook

    # They run before the hooks of FSDP2, so that a segment holds the gathering of its layer.
    handles = [layer.register_forward_pre_hook(enter(i), prepend=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave(i), prepend=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
