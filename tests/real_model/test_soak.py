"""Three hundred steps: after each evaluation and each checkpoint a run holds what it held after the ones before."""

import ctypes
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from common.data.rows import load_rows
from common.model.activation_checkpointing import checkpoint_activations
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.plan.machine_plan import plan_for_card
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run import training
from common.run.generation import generate
from common.run.prompts import sample_prompts
from tests.conftest import ROOT, small_recipe

SEQ_LEN = 32
SETTLED = 50  # steps, after which nothing is made for the first time
# Of what is no tensor that Python can see, such as what a graph saves, the least that a step could keep is the hidden
# states of one layer: 32 tokens of 576 numbers in fp32, 72 KiB. The bound on the growth is half of it.
MAX_BYTES_A_STEP = SEQ_LEN * 576 * 4 / 2


def resident_bytes() -> int:
    """Resident memory of this process, without the pages that malloc keeps of what was freed."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@dataclass(frozen=True)
class Held:
    """What the process holds after a step."""

    step: int
    tensors: int  # that are alive
    graphs: int  # tensors among them that an autograd graph made
    allocated: int  # bytes on the GPU
    resident: int  # bytes of host memory


class Holdings(TrainerCallback):
    """Notes what is held after each evaluation and each checkpoint. between: called after each evaluation's note."""

    def __init__(self, between: Callable[[], object]) -> None:
        self.between = between
        self.after: dict[str, list[Held]] = {"evaluation": [], "checkpoint": []}

    def _note(self, kind: str, step: int) -> None:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        graphs = sum(tensor.grad_fn is not None for tensor in tensors)
        allocated = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.after[kind].append(Held(step, len(tensors), graphs, allocated, resident_bytes()))

    def on_evaluate(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self._note("evaluation", state.global_step)
        self.between()

    def on_save(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self._note("checkpoint", state.global_step)

    def leaks(self, settled: int, most: float = MAX_BYTES_A_STEP) -> list[str]:
        """What grew after the step `settled`, in words. most: bytes of host memory a step."""
        found = []
        for kind, notes in self.after.items():
            later = [held for held in notes if held.step > settled]
            assert len(later) > 2
            for name in ("tensors", "graphs", "allocated"):
                counts = [getattr(held, name) for held in later]
                if len(set(counts)) > 1:
                    found.append(f"{name} after each {kind}: {counts}")
            slope = np.polyfit([held.step for held in later], [held.resident for held in later], 1)[0]
            print(f"host memory after each {kind}: {slope / 1024:.1f} KiB a step,", [h.resident >> 10 for h in later])
            if slope > most:
                found.append(f"host memory after each {kind}: {slope:.0f} bytes a step")
        return found


def soak(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, leak: Callable[[Any], object] | None = None) -> Holdings:
    """A run with answers to two prompts between the evaluations. leak: gets what the model returns at each call."""
    Path(recipe.out).mkdir(parents=True, exist_ok=True)
    plan, tokenizer = plan_for_card(recipe), load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len)
    model = attach_lora(load_4bit(recipe.model), recipe.lora, recipe.train.seed)
    use_lean_layers(model, recipe.train.kernels)
    checkpoint_activations(model, plan.checkpointing)
    if leak is not None:
        model.register_forward_hook(lambda module, inputs, output: leak(output))
    prompts = sample_prompts(rows.evaluation, tokenizer, 2)
    assert len(prompts) == 2
    holdings = Holdings(lambda: generate(model, tokenizer, prompts, max_new_tokens=8))
    build = training.build_trainer

    def build_and_watch(*arguments: Any, **named: Any) -> Any:
        trainer = build(*arguments, **named)
        trainer.add_callback(holdings)
        return trainer

    monkeypatch.setattr(training, "build_trainer", build_and_watch)
    training.train(model, tokenizer, rows, recipe, plan)
    return holdings


def write_texts(path: Path, *names: str) -> str:
    path.write_text("".join(json.dumps({"text": (ROOT / "docs" / name).read_text()}) + "\n" for name in names))
    return str(path)


def long_recipe(model: Path, folder: Path) -> Recipe:
    """Three hundred steps of a row of 32 tokens, with ten evaluations and ten checkpoints."""
    held_out = folder / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": f"{n} paints the old roof on Friday."}) + "\n" for n in range(4)))
    return Recipe(
        ModelSpec(str(model)),
        DataSpec(
            write_texts(folder / "texts.jsonl", "memory.md", "speed.md", "gpus.md"),
            eval_source=str(held_out),
            drift_source=None,
        ),
        LoraSpec(rank=4, alpha=8),
        TrainSpec(
            seq_len=SEQ_LEN,
            rows_per_step=1,
            learning_rate=2e-4,
            max_steps=300,
            eval_every=30,
            save_every=30,
            sample_answers=0,
        ),
        card_gib=None,
        out=str(folder / "run"),
    )


@pytest.mark.slow  # three hundred steps
def test_three_hundred_steps_leave_nothing_behind(real_model, tmp_path, monkeypatch):
    holdings = soak(long_recipe(real_model, tmp_path), monkeypatch)
    assert [len(notes) for notes in holdings.after.values()] == [11, 10]  # evaluations: one before the first step
    print(holdings.after)
    assert holdings.leaks(SETTLED) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here; runs on a machine with one")
@pytest.mark.filterwarnings("default:.*determinis.*:UserWarning")
def test_three_hundred_steps_leave_no_byte_behind_on_a_gpu(real_model, tmp_path, monkeypatch):
    holdings = soak(long_recipe(real_model, tmp_path), monkeypatch)
    assert all(held.allocated > 0 for notes in holdings.after.values() for held in notes)
    print(holdings.after)
    assert holdings.leaks(SETTLED) == []


KEPT: list[object] = []
LEAKS = {
    "nothing": None,
    "a loss with its graph": lambda output: KEPT.append(output.loss),
    "host memory": lambda output: KEPT.append(b"x" * (4 << 20)),
}


@pytest.mark.slow  # each note collects the garbage of a whole test process
@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found(small_llama, tmp_path, monkeypatch, name):
    """By the same means, in a run that is too short for a fine bound."""
    recipe = small_recipe(small_llama, tmp_path)
    train = replace(recipe.train, rows_per_step=1, max_steps=10, eval_every=2, save_every=2, sample_answers=0)
    recipe = replace(recipe, train=train, data=replace(recipe.data, eval_rows=2, drift_source=None))
    try:
        found = soak(recipe, monkeypatch, LEAKS[name]).leaks(settled=4, most=1 << 20)
    finally:
        KEPT.clear()
    text = "; ".join(found)
    assert bool(found) == (name != "nothing"), text
    assert ("graphs after each evaluation" in text) == ("tensors after each checkpoint" in text) == ("graph" in name)
    assert ("host memory after each evaluation" in text) or name != "host memory"
