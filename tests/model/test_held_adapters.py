"""Copies of the adapters that are held for an optimizer step are never older than the adapters."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.held_adapters import held_adapters
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora, trainable_params
from common.model.optimizer import build_optimizer
from common.recipe import LoraSpec, ModelSpec, TrainSpec
from common.run.trainer_config import build_trainer
from tests.conftest import FP32
from tests.run.test_training import prepare, split

IDS = torch.arange(10, 74).view(2, 32)
LORA = LoraSpec(rank=4, alpha=8)


def adapted(folder, dtype=torch.float32, kept=1):
    machine = replace(FP32, dtype=dtype) if dtype != torch.float32 else FP32
    model = attach_lora(load_4bit(ModelSpec(str(folder)), machine), LORA)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: without this no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.05)
    use_lean_layers(model, "lean")
    checkpoint_activations(model, Policy(2, kept))
    return model.train()


def loss_of(model) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def trained(folder, optimizer: str, holds: bool) -> dict[str, torch.Tensor]:
    """The adapter after three optimizer steps of two micro-batches, with a loss without gradients in between."""
    model = adapted(folder)
    held = held_adapters(model)
    train = TrainSpec(seq_len=64, rows_per_step=2, learning_rate=1e-2, optimizer=optimizer)
    steps = build_optimizer(model, train)
    for _ in range(3):
        if holds:
            held.hold()
        for _ in range(2):
            loss_of(model).backward()
        held.release()
        steps.step()
        steps.zero_grad()
        with torch.no_grad():
            loss_of(model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_steps_with_held_adapters_are_the_same_bit_for_bit(small_llama, optimizer):
    expected, got = (trained(small_llama, optimizer, holds) for holds in (False, True))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def noise(model, std: float = 0.05) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {name: torch.randn_like(tensor) * std for name, tensor in get_peft_model_state_dict(model).items()}


@torch.no_grad()
def copy_into(model) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.ones_like(parameter))


CHANGES = {
    "a checkpoint is loaded": lambda model: set_peft_model_state_dict(model, noise(model)),
    "values are copied into them": copy_into,
    "the adapter is switched off": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_they_are_held_is_seen_all_the_same(small_llama, change):
    """It is against the rule, so this is the second line of defence: whoever holds them says when they change.

    An optimizer's step it would not see: torch's fused AdamW and bitsandbytes do not count what they change.
    """
    losses = []
    for holds in (False, True):
        model = adapted(small_llama)
        if holds:
            held_adapters(model).hold()
        before = loss_of(model)
        before.backward()
        CHANGES[change](model)
        losses.append((before.item(), loss_of(model).item()))
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_in_a_run_they_are_held_in_a_step_and_between_steps_they_are_not(recipe):
    """So evaluations and checkpoints between two steps see the adapters as they are."""
    recipe = replace(recipe, train=replace(recipe.train, eval_every=1, save_every=1))
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, 2, Policy(2, 1)))
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    held, seen = held_adapters(model), []

    class Look(TrainerCallback):
        def on_step_begin(self, *_, **__):
            seen.append(("between", len(held.tensors())))

        def on_substep_end(self, *_, **__):
            seen.append(("in", len(held.tensors())))

        on_pre_optimizer_step = on_evaluate = on_save = on_step_end = on_step_begin

    trainer.add_callback(Look())
    trainer.train()
    copies = 2 * (1 + 3 + 1 + 1 + 1 + 2 + 1 + 1)  # layers * (stacked A and each B of q k v, o, gate up, down)
    assert {entry for entry in seen} == {("between", 0), ("in", copies)}
    assert seen[-1] == ("between", 0)


class Casts(TorchDispatchMode):
    """Counts casts of adapters and concatenations of them."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32 and args[0].ndim == 2:
            self.count += LORA.rank in args[0].shape
        if operator is torch.ops.aten.cat.default:
            self.count += len(args[0][0]) == LORA.rank
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("holds", "casts"), [(False, 2 * 2 * (14 + 2)), (True, 0)])
def test_a_later_micro_batch_casts_and_stacks_nothing(small_llama, holds, casts):
    """Else each of 2 layers does it in forward and in backward: 14 casts, and q, k, v and gate, up are concatenated."""
    model = adapted(small_llama, kept=2, dtype=torch.bfloat16)
    held = held_adapters(model)
    if holds:
        held.hold()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
        with Casts() as found:
            loss_of(model).backward()
    assert sum(tensor.nbytes for tensor in held.tensors()) == (2 * trainable_params(model) if holds else 0)
    assert found.count == casts
