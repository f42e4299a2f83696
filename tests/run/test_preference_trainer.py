"""Preference losses of whole optimizer steps: the formulas of their papers, whatever the split."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from common.model.activation_checkpointing import decoder_layers
from common.recipe import PreferenceSpec
from common.run.metrics_file import read_metrics
from common.run.preference_metrics import taken_from
from common.run.reference import with_reference
from common.run.trainer import Trainer
from common.run.trainer_config import build_trainer
from common.run.training import train
from tests.run.preference_rows import Exact, answers_of, made_recipe, move_adapter, prepare_by_hand
from tests.run.test_training import adapter, interrupt_at

SPECS = {
    "dpo": PreferenceSpec("dpo"),
    "dpo with all its values": PreferenceSpec(
        "dpo", beta=0.3, label_smoothing=0.1, sft_weight=0.2, length_normalized=True
    ),
    "ipo": PreferenceSpec("ipo", sft_weight=0.1),
    "simpo": PreferenceSpec("simpo", label_smoothing=0.1, sft_weight=0.5),
    "orpo": PreferenceSpec("orpo"),
    "kto": PreferenceSpec("kto", beta=0.2, desirable_weight=1.3, undesirable_weight=0.7),
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """References are kept in the working directory."""
    monkeypatch.chdir(tmp_path)


def built(recipe, micro_batch_rows=2, rows=None):
    """A trainer whose adapter has moved since the reference was computed, and its rows."""
    model, tokenizer, rows, recipe, plan = prepare_by_hand(recipe, micro_batch_rows, rows)
    rows = with_reference(model, tokenizer, rows, recipe, plan)
    move_adapter(model)
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    trainer.current_gradient_accumulation_steps = plan.accumulation
    return trainer, rows


def one_step(trainer, rows) -> float:
    """The loss of an optimizer step of the first four rows; their gradients are in the model."""
    size = trainer.args.per_device_train_batch_size
    loader = DataLoader(rows.train.select(range(4)), size, collate_fn=trainer.data_collator)
    trainer.model.train()
    batches, items = trainer.get_batch_samples(iter(loader), 4 // size, torch.device("cpu"))
    return sum(trainer.training_step(trainer.model, batch, items).item() for batch in batches)


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_loss_and_every_adapter_gradient_are_those_of_the_formula_in_float64(spec, small_llama, tmp_path):
    recipe = made_recipe(small_llama, tmp_path / "run", spec)
    trainer, rows = built(recipe)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    exact = Exact(recipe.model.name, trained, recipe.lora)
    loss = one_step(trainer, rows)
    expected = exact.loss(answers_of(rows.train.select(range(4))), spec)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    largest = max(tensor.grad.abs().max().item() for tensor in exact.adapter.values())
    assert largest > 1e-3
    for name, gradient in gradients(trainer).items():
        # fp32's rounding through two layers, relative to the largest entry
        torch.testing.assert_close(gradient.double(), exact.adapter[name].grad, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_splitting_the_rows_into_micro_batches_changes_nothing(loss, small_llama, tmp_path):
    recipe = made_recipe(small_llama, tmp_path / "run", PreferenceSpec(loss))
    results = []
    for size in (4, 1):
        trainer, rows = built(recipe, size)
        results.append((one_step(trainer, rows), gradients(trainer), trainer.step_metrics()))
    (whole, expected, metrics), (parts, got, again) = results
    assert parts == pytest.approx(whole, rel=1e-6)
    assert again == pytest.approx(metrics, rel=1e-5)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():  # the same sum in another order
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("loss", ["ipo", "kto"])
def test_halving_after_out_of_memory_changes_nothing(loss, small_llama, tmp_path, capsys):
    recipe = made_recipe(small_llama, tmp_path / "run", PreferenceSpec(loss))
    trainer, rows = built(recipe, 4)
    expected, metrics = one_step(trainer, rows), trainer.step_metrics()
    plenty = {name: gradient.clone() for name, gradient in gradients(trainer).items()}
    tight, rows = built(recipe, 4)
    failures = []

    def check(_, arguments) -> None:
        if arguments[0].shape[0] > 1 and torch.is_grad_enabled():
            failures.append(torch.is_grad_enabled())
            raise torch.OutOfMemoryError("CUDA out of memory, injected")

    decoder_layers(tight.model)[1].register_forward_pre_hook(check)
    assert one_step(tight, rows) == pytest.approx(expected, rel=1e-6)
    assert failures and tight.step_down.taken[-1].endswith("each micro-batch in 4 parts")
    assert tight.step_metrics() == pytest.approx(metrics, rel=1e-5)  # nothing is counted twice
    largest = max(gradient.abs().max().item() for gradient in plenty.values())
    for name, gradient in gradients(tight).items():
        torch.testing.assert_close(gradient, plenty[name], rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto"])
def test_a_resumed_run_ends_at_the_same_adapter_bit_for_bit(loss, small_llama, tmp_path, monkeypatch):
    recipe = made_recipe(small_llama, tmp_path / "whole", PreferenceSpec(loss), max_steps=4, save_every=2)
    train(*prepare_by_hand(recipe))
    part = replace(recipe, out=str(tmp_path / "part"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log", interrupt_at(3))
        with pytest.raises(KeyboardInterrupt):
            train(*prepare_by_hand(part))
    assert [path.name for path in Path(part.out, "checkpoints").iterdir()] == ["checkpoint-2"]
    train(*prepare_by_hand(replace(part, existing_run="resume")))
    expected, got = adapter(recipe.out), adapter(part.out)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    steps = [[entry for entry in read_metrics(Path(run.out)) if "loss" in entry] for run in (recipe, part)]
    for whole, again in zip(*steps, strict=True):
        for name in ("loss", *taken_from(whole)):
            assert again[name] == whole[name]
