"""A GPU computes what the host has given it. Where the host waits for a result, or copies one, the GPU falls idle.

A CPU has nothing to wait for, so these tests look at what is asked for: the operators that give a value to the host,
and the calls that mean a copy on a GPU, although a tensor on a CPU is there already.
"""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.attention import PACKED_ATTENTION
from common.model.weight_streaming import stream_weights
from common.recipe import PreferenceSpec
from common.run.metrics_file import read_metrics
from common.run.reference import with_reference
from common.run.trainer_config import build_trainer
from common.run.training import train as train_whole
from tests import flash_on_cpu  # noqa: F401  (gives the CPU flash attention's operators)
from tests.run.preference_rows import made_recipe, prepare_by_hand
from tests.run.test_training import prepare, split

# Operators whose result the host must have: a number, or the size of another tensor. torch's own warning of them is
# torch.cuda.set_sync_debug_mode.
WAITING_OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave.Tensor",
    "bincount",
}
WAITING_METHODS = {"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "pin_memory"}


class Waits(TorchDispatchMode):
    """Counts operators of the block after which the host waits for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator).removeprefix("aten.").removesuffix(".default")
        masked = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], list | tuple) else [])
        )
        if name in WAITING_OPERATORS or name.split(".")[0] in WAITING_OPERATORS or masked:
            self.found[name] += 1
        return operator(*args, **(kwargs or {}))


class HostCalls(TorchFunctionMode):
    """Counts calls of the block that copy a tensor to the host, or Python's numbers to a tensor on the GPU.

    A copy to a torch.device is none of them: the trainer puts batches on its device, which on a CPU is the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        to_host = name == "to" and "cpu" in (*args[1:], *(kwargs or {}).values())
        from_list = function in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None
        from_list |= function is Tensor.new_tensor
        if to_host or from_list or (name in WAITING_METHODS and (resolve_name(function) or "").startswith("torch.T")):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def waits_in(run) -> Counter[str]:
    with HostCalls() as calls, Waits() as waits:
        run()
    return calls.found + waits.found


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.new_tensor(3),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_the_count_sees_each_way_to_wait(wait):
    assert waits_in(lambda: wait(torch.randn(4)))


class Moments(TrainerCallback):
    """Counts what the host waits for between the ends of two micro-batches, and between those of two steps."""

    def __init__(self, calls: HostCalls, waits: Waits) -> None:
        self.calls, self.waits = calls, waits
        self.in_micro_batches: list[Counter[str]] = []
        self.in_steps: list[Counter[str]] = []

    def take(self) -> Counter[str]:
        found = self.calls.found + self.waits.found
        self.calls.found.clear()
        self.waits.found.clear()
        return found

    def on_step_begin(self, *_, **__):
        self.in_steps.append(self.take())

    def on_substep_end(self, *_, **__):
        self.in_micro_batches.append(self.take())


def train(model, tokenizer, data, recipe, plan) -> Moments:
    trainer = build_trainer(model, tokenizer, data, recipe, plan, Path(recipe.out))
    with HostCalls() as calls, Waits() as waits:
        moments = Moments(calls, waits)
        trainer.add_callback(moments)
        trainer.train()
    return moments


def train_packed(prepared, policy: Policy, on_host: int = 0) -> Moments:
    """As on a GPU: packed rows, and the operators of flash attention. on_host: layers whose weights stream."""
    model, tokenizer, data, recipe, plan = prepared
    model.set_attn_implementation(PACKED_ATTENTION)
    stream_weights(model, on_host)
    checkpoint_activations(model, policy)
    if recipe.preference is not None:
        data = with_reference(model, tokenizer, data, recipe, plan)
    return train(model, tokenizer, data, recipe, replace(plan, checkpointing=policy))


POLICIES = (
    Policy(2, 1),
    Policy(2, keep_attention=True),
    Policy(2, offload=True),
    Policy(2, tile=48, offload=True),
    Policy(2, tile=48, by_head=True, offload=True),
)


@pytest.mark.parametrize(
    ("policy", "on_host"), [*((policy, 0) for policy in POLICIES), (POLICIES[0], 2), (POLICIES[-1], 2)], ids=str
)
def test_no_micro_batch_waits_for_the_gpu(recipe, policy, on_host):
    """Forward, loss and backward of packed rows as on a GPU: the host only launches."""
    moments = train_packed(prepare(recipe, split(recipe, 1)), policy, on_host)
    assert len(moments.in_micro_batches) == 3 * 3  # of four the last one ends with the step
    assert not any(moments.in_micro_batches), moments.in_micro_batches
    # Once a step: whether loss and gradient norm are finite; both are shown. The batches are made on the host, where
    # the trained positions of each are found, and the token ids for an embedding that waits there.
    shown = {"item": 2, "__bool__": 1, "_local_scalar_dense": 3}
    assert moments.in_steps[-1] == shown | {"nonzero": 4, "numpy": 4}


@pytest.mark.parametrize("spec", [PreferenceSpec("dpo", sft_weight=0.1), PreferenceSpec("orpo"), PreferenceSpec("kto")])
def test_no_micro_batch_of_preferences_waits_either(small_llama, tmp_path, monkeypatch, spec):
    """The loss, and what is added up for the metrics of the step."""
    monkeypatch.chdir(tmp_path)
    prepared = prepare_by_hand(made_recipe(small_llama, tmp_path / "run", spec), 1)
    moments = train_packed(prepared, POLICIES[-1])
    assert len(moments.in_micro_batches) == 3 * 3
    assert not any(moments.in_micro_batches), moments.in_micro_batches


def test_where_there_is_no_flash_attention_a_micro_batch_waits_once_for_its_mask(recipe):
    """transformers asks whether a row holds several examples."""
    moments = train(*prepare(recipe, split(recipe, 1, Policy(2, 1))))
    assert all(found == {"__bool__": 1, "_local_scalar_dense": 1} for found in moments.in_micro_batches)


def test_no_micro_batch_sets_the_mode_of_modules_that_train_already(recipe, monkeypatch):
    """Whoever left a part of the model in another mode between two steps is put right, as by the stock trainer."""
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, 1))
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    set_modes, steps, modes = [], [], []
    stock = torch.nn.Module.train

    def train(module, mode=True):
        set_modes.append(trainer.state.global_step)
        return stock(module, mode)

    class Evaluated(TrainerCallback):
        def on_step_begin(self, _, state, *__, **___):
            steps.append(len(set_modes))
            if state.global_step == 2:
                model.get_input_embeddings().training = False

        def on_substep_end(self, *_, **__):
            modes.append(all(module.training for module in model.modules()))

    monkeypatch.setattr(torch.nn.Module, "train", train)
    trainer.add_callback(Evaluated())
    trainer.train()
    modules = len(list(model.modules()))
    assert all(modes) and len(modes) == 3 * 3
    assert steps[0] == steps[1] == steps[2]  # nothing was set in two steps of four micro-batches
    assert set_modes.count(2) == modules  # once, in the first micro-batch of the third
    assert "train" not in vars(model)


def test_tokens_are_counted_without_padding_and_go_on_after_a_resume(recipe):
    recipe = replace(recipe, train=replace(recipe.train, save_every=1))
    model, tokenizer, rows, _, plan = prepare(recipe, split(recipe, 2))
    train_whole(model, tokenizer, rows, recipe, plan)
    whole = [entry["tokens"] for entry in read_metrics(Path(recipe.out)) if "tokens" in entry]
    assert whole[0] < whole[1] < whole[2] < 12 * 128  # rows are shorter than seq_len
    lengths = [len(row["input_ids"]) for row in rows.train]
    assert min(lengths) * 4 <= whole[0] <= max(lengths) * 4
    shutil.rmtree(Path(recipe.out) / "checkpoints" / "checkpoint-3")
    train_whole(*prepare(replace(recipe, existing_run="resume"), split(recipe, 1)))
    assert [entry["tokens"] for entry in read_metrics(Path(recipe.out)) if "tokens" in entry] == whole
