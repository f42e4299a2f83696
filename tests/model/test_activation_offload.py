"""Layer inputs in host memory, on a device double whose copies happen at the last moment: when they are waited for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.model import activation_offload
from common.model.activation_checkpointing import Policy, checkpoint_activations, decoder_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec
from tests.conftest import FP32

IDS = torch.arange(10, 74).view(2, 32)


class PoisonedClock:
    """In the place of the CUDA stream that copies: a target holds NaN until the copy is waited for.

    The copies happen in the order in which they were begun, from what the source holds then.
    """

    def __init__(self) -> None:
        self.under_way: list[Callable[[], object]] = []
        self.strided = 0

    def copy(self, source: Tensor, target: Tensor) -> Tensor:
        self.strided += not source.is_contiguous()
        target.fill_(float("nan"))
        self.under_way.append(lambda: target.copy_(source))
        return target

    def wait(self, device: torch.device) -> None:
        for copy in self.under_way:
            copy()
        self.under_way.clear()


@pytest.fixture
def clock(monkeypatch) -> PoisonedClock:
    clock = PoisonedClock()
    monkeypatch.setattr(activation_offload, "_copy", clock.copy)
    monkeypatch.setattr(activation_offload, "wait_for_copies", clock.wait)
    return clock


def gradients(model, policy: Policy) -> dict[str, Tensor]:
    checkpoint_activations(model, policy)
    model.zero_grad()
    for _ in range(2):  # the second micro-batch begins with what the first left
        model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("strided", [False, True])
def test_no_copy_is_read_before_it_is_there_and_strides_change_nothing(small_model, clock, strided):
    """Gradients are those without recompute, also where the layers' inputs are views with other strides.

    Bit for bit where they are not: a matmul of other strides adds up in another order.
    """
    model = attach_lora(load_4bit(ModelSpec(str(small_model(num_hidden_layers=4))), FP32), LoraSpec(rank=4, alpha=8))
    model.train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    for layer in decoder_layers(model) if strided else ():
        layer.register_forward_hook(lambda _, __, output: output.transpose(1, 2).contiguous().transpose(1, 2))
    expected = gradients(model, Policy(4, 4))
    found = gradients(model, Policy(4, 1, offload=True))
    assert clock.strided == (2 * 2 if strided else 0)  # the inputs of the second and the third layer, twice
    for name, gradient in expected.items():
        atol = 1e-5 * gradient.abs().max().item() if strided else 0
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=name)


def test_pinned_memory_that_runs_out_is_memory_of_the_host(monkeypatch):
    def fail(*_, **__):
        raise torch.AcceleratorError("CUDA error: out of memory")  # cudaHostAlloc's

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(MemoryError, match="pinned host memory"):
        activation_offload.to_host(torch.ones(2))
