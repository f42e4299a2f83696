"""The largest step is computed before the first one: what does not fit shows there, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from common.data.rows import Rows
from common.machine.device import GIB, Machine
from common.model.activation_checkpointing import Policy
from common.run import rehearsal
from common.run.rehearsal import rehearse, worst_batch
from common.run.trainer_config import build_trainer
from tests.run.test_step_down import run
from tests.run.test_training import prepare, split


def test_the_rehearsal_finds_what_does_not_fit_before_the_first_step(recipe):
    _, metrics, memory = run(recipe, split(recipe, 2, Policy(2, 2)), kept=0)
    assert memory.failures == 2  # 2 kept, then 1
    assert metrics["step_downs"] == ["step 1: the first 1 of 2 layers recompute", "step 1: every layer recomputes"]
    assert len(memory.largest) == 2 + 3 * 2  # the rehearsal again, then three steps of two micro-batches: none is lost


def test_the_rehearsal_takes_the_longest_rows_full_of_trained_tokens(recipe):
    _, _, rows, _, plan = prepare(recipe, split(recipe, 2))
    batch = worst_batch(rows, plan.micro_batch_rows, padding_free=False)
    lengths = [sum(n) for part in (rows.train, rows.evaluation) for n in part["seq_lengths"]]
    assert batch["input_ids"].shape == (2, max(lengths))
    examples = (batch["position_ids"] == 0).sum()
    assert len(batch["trained_positions"]) == batch["labels"].numel() - examples


def test_packed_rows_are_rehearsed_with_the_most_examples_of_any():
    lengths = [[90], [10] * 8, [40, 44], [1] * 60]
    table = {
        "input_ids": [[7] * sum(row) for row in lengths],
        "labels": [[7] * sum(row) for row in lengths],
        "seq_lengths": lengths,
    }
    rows = Rows(Dataset.from_dict(table), None, [])
    assert rows.most_examples == 60
    batch = worst_batch(rows, 2, padding_free=True)
    assert batch["input_ids"].shape == (1, 90 + 84)  # the two longest, with as many examples as the two that have most
    bounds = batch["cu_seq_lens_q"]
    assert len(bounds) - 1 == 60 + 8 and bounds[-1] == 90 + 84
    assert batch["max_length_q"] == (bounds[1:] - bounds[:-1]).max() == 11  # 84 tokens as 8
    assert ((batch["position_ids"][0] == 0).nonzero()[:, 0] == bounds[:-1]).all()


def test_the_rehearsal_leaves_no_trace(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, 2))
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    trainer.rehearse()
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_alone_it_finds_room_for_the_optimizer_states_and_takes_their_memory_back(recipe):
    """Two micro-batches, then an evaluation, each beside states that are not there yet."""
    model, _, rows, _, plan = prepare(recipe, split(recipe, 2))
    batch = worst_batch(rows, 2, padding_free=False)
    calls = []

    def train_micro_batch(inputs, trained_tokens):
        loss = model(**inputs, num_items_in_batch=trained_tokens).loss
        loss.backward()
        calls.append(("backward", trained_tokens.item()))
        return loss

    rehearse(
        model,
        batch,
        train_micro_batch,
        lambda inputs: calls.append(("held-out loss", len(inputs["trained_positions"]))) or 0.0,
        device=torch.device("cpu"),
        accumulates=True,
        missing_state_bytes=1 << 20,
    )
    tokens = len(batch["trained_positions"])
    assert calls == [("backward", tokens), ("backward", tokens), ("held-out loss", tokens)]
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="allocate"):  # states that do not fit end the run here
        rehearse(
            model,
            batch,
            train_micro_batch,
            lambda inputs: 0.0,
            device=torch.device("cpu"),
            accumulates=False,
            missing_state_bytes=1 << 60,
        )


class Allocator:
    """The GPU allocator's statistics, in bytes, as torch.cuda gives them."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.peak = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: self.take(0, anew=True))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def take(self, size: int, *, anew: bool = False) -> None:
        self.now += size
        self.peak = self.now if anew else max(self.peak, self.now)


def test_the_peak_that_is_compared_with_the_plan_begins_with_it(recipe, monkeypatch):
    """Loading took more than any step will."""
    model, _, rows, _, _ = prepare(recipe, split(recipe, 2))
    gpu, allocator = Machine(torch.device("cuda", 0), torch.bfloat16, "faked", "a GPU"), Allocator(monkeypatch)
    monkeypatch.setattr(rehearsal, "this_machine", lambda: gpu)
    allocator.take(20 * GIB)
    allocator.take(-15 * GIB)  # 5 GiB stay: the model

    def train_micro_batch(*_) -> torch.Tensor:
        allocator.take(3 * GIB)
        allocator.take(-3 * GIB)
        return torch.zeros(())

    rehearse(
        model,
        worst_batch(rows, 2, padding_free=False),
        train_micro_batch,
        lambda _: 0.0,
        device=torch.device("cpu"),
        accumulates=False,
        missing_state_bytes=0,
    )
    assert gpu.allocated_bytes() == 8 * GIB
