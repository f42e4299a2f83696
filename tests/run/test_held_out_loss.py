"""The held-out loss of a run and of make eval: one function, weighted by tokens."""

from functools import partial
from pathlib import Path

import pytest
import torch

from common.data.batches import collate
from common.run.held_out_loss import batch_nll, fill_up, lowest_held_out_loss, mean_nll, own_batches, perplexity
from common.run.trainer_config import build_trainer
from tests.run.test_training import prepare


def test_the_held_out_loss_weighs_every_token_alike(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe)
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    nll, tokens = 0.0, 0
    model.eval()
    for row in rows.evaluation:
        batch = collate([row], tokenizer.pad_token_id)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        nll += torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum").item()
        tokens += (batch["labels"][0, 1:] != -100).sum().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll / tokens, rel=1e-6)


def test_it_does_not_depend_on_the_size_of_a_micro_batch(recipe):
    """Rows of unlike lengths: a mean over micro-batches, or rows, would differ."""
    model, tokenizer, rows, _, _ = prepare(recipe)
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id)

    def nll(batch):
        return batch_nll(model, batch).item()

    one, tokens = mean_nll(rows.evaluation, nll, collate_rows)
    assert tokens == sum(label != -100 for row in rows.evaluation for label in row["labels"])
    for size in (3, 100):
        assert mean_nll(rows.evaluation, nll, collate_rows, size) == (pytest.approx(one, rel=1e-6), tokens)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode(recipe, training):
    model, _, rows, _, _ = prepare(recipe)
    model.train(training)
    assert batch_nll(model, collate([rows.train[0]], 0)).requires_grad is False
    assert model.training is training


def test_a_process_alone_fills_nothing_up():
    batches = [{"input_ids": torch.ones(1, 1)}] * 3
    assert list(fill_up(batches, None)) == list(fill_up(batches, {})) == batches


def test_a_perplexity_beyond_all_floats_is_a_float():
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == perplexity(700.0) < float("inf")


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        ([2.0, 1.0, 0.8445, 1.0778], "was lowest at step 20 (0.8445); it is 1.0778 now: fewer epochs would do"),
        ([2.0, 2.5], "was lowest at step 0 (2.0000); it is 2.5000 now: training made it worse. Try a lower"),
        ([2.0, 1.0, 1.009], None),  # within a hundredth
        ([2.0], None),
        ([], None),
    ],
)
def test_a_held_out_loss_that_was_lower_before_the_end_is_said(losses, line):
    entries = [{"step": 10 * number, "eval_loss": loss} for number, loss in enumerate(losses)]
    entries.append({"step": 11, "loss": 3.0})
    said = lowest_held_out_loss(entries)
    assert said is None if line is None else line in said


def test_a_micro_batch_is_made_when_it_is_computed_and_not_before():
    """All held-out rows of a million tokens at once would take gigabytes."""
    rows, events = [{"input_ids": [1, 2]}] * 5, list[str]()

    def collate_rows(rows):
        events.append("made")
        return {"trained_positions": torch.zeros(len(rows))}

    def nll(batch):
        events.append("computed")
        return 1.0

    assert mean_nll(rows, nll, collate_rows) == (1.0, 5)
    assert events == ["made", "computed"] * 5
    assert [len(batch) for batch in own_batches(rows, lambda part: part, 2)] == [2, 2, 1]
