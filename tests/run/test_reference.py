"""The reference: log-likelihoods under the model as the run begins, computed once and found again."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from common.model.activation_checkpointing import decoder_layers
from common.recipe import PreferenceSpec, UserError
from common.run import reference
from common.run.folder import HELD_OUT_ROWS
from common.run.metrics_file import read_metrics
from common.run.reference import with_reference
from common.run.training import train
from tests.run.preference_rows import (
    Exact,
    answers_of,
    made_recipe,
    made_rows,
    move_adapter,
    pack_by_hand,
    prepare_by_hand,
)

DPO, KTO = PreferenceSpec("dpo"), PreferenceSpec("kto")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """References are kept in the working directory."""
    monkeypatch.chdir(tmp_path)


def referenced(recipe, rows=None, rows_at_a_time=3, moved=False):
    """The rows with their reference, of a model as the recipe begins, and the model."""
    model, tokenizer, rows, recipe, plan = prepare_by_hand(recipe, rows=rows)
    if moved:
        move_adapter(model)
    return with_reference(model, tokenizer, rows, recipe, replace(plan, reference_rows=rows_at_a_time)), model


@pytest.mark.parametrize("spec", [DPO, KTO], ids=["dpo", "kto"])
@pytest.mark.parametrize("moved", [False, True], ids=["new adapter", "an adapter"])
def test_it_is_the_likelihood_of_each_answer_by_the_model_as_it_is(spec, moved, small_llama, tmp_path):
    recipe = made_recipe(small_llama, tmp_path / "run", spec)
    rows, model = referenced(recipe, moved=moved)
    exact = Exact(recipe.model.name, {n: p for n, p in model.named_parameters() if p.requires_grad}, recipe.lora)
    for data in (rows.train, rows.evaluation):
        for row, answers in zip(data, answers_of(data), strict=True):
            expected = [exact.likelihood(prompt, answer).item() for prompt, answer, _ in answers]
            assert row["reference"] == pytest.approx(expected, rel=1e-5)
            if spec is KTO and len(answers) > 1:
                turned = zip(answers, answers[1:] + answers[:1], strict=True)
                others = [exact.likelihood(asked[0], other[1]).item() for asked, other in turned]
                assert row["kl_reference"] == pytest.approx(others, rel=1e-5)
            if spec is KTO and len(answers) == 1:
                assert row["kl_reference"] == []
    assert ("kl_reference" in rows.train.column_names) == (spec is KTO)


def test_losses_that_need_none_have_none(small_llama, tmp_path):
    recipe = made_recipe(small_llama, tmp_path / "run", PreferenceSpec("simpo"))
    rows, _ = referenced(recipe)
    assert "reference" not in rows.train.column_names
    assert not Path(".cache").exists()


class Forwards:
    """Counts the forward passes of a model."""

    def __init__(self, model) -> None:
        self.count = 0
        decoder_layers(model)[0].register_forward_pre_hook(self.add)

    def add(self, *_) -> None:
        self.count += 1


def test_a_second_run_takes_the_same_bits_from_the_file_and_computes_nothing(small_llama, tmp_path, capsys):
    recipe = made_recipe(small_llama, tmp_path / "run", DPO)
    first, _ = referenced(recipe)
    (path,) = Path(".cache/references").iterdir()
    assert f"kept in {path}" in capsys.readouterr().out
    model, tokenizer, rows, recipe, plan = prepare_by_hand(replace(recipe, preference=PreferenceSpec("ipo")))
    forwards = Forwards(model)
    second = with_reference(model, tokenizer, rows, recipe, plan)
    assert forwards.count == 0
    assert second.train["reference"][:] == first.train["reference"][:]
    assert second.evaluation["reference"][:] == first.evaluation["reference"][:]
    assert f"taken from {path}" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["half", "other bytes", "other count"])
def test_a_damaged_file_is_computed_again(harm, small_llama, tmp_path):
    recipe = made_recipe(small_llama, tmp_path / "run", DPO)
    expected, _ = referenced(recipe)
    (path,) = Path(".cache/references").iterdir()
    if harm == "other count":
        reference._save(path, torch.zeros(3, dtype=torch.float64).numpy())
    else:
        path.write_bytes(path.read_bytes()[:40] if harm == "half" else b"x" * 400)
    again, _ = referenced(recipe)
    assert again.train["reference"][:] == expected.train["reference"][:]


@pytest.mark.parametrize("change", ["rows", "which is better", "base", "bits", "RoPE", "a loss for rated answers"])
def test_another_model_or_other_rows_have_another_file(change, small_llama, small_model, tmp_path):
    recipe = made_recipe(small_llama, tmp_path / "run", DPO)
    rows = made_rows(DPO)
    referenced(recipe, rows)
    if change == "rows":
        rows = replace(rows, evaluation=pack_by_hand(answers_of(rows.train)[0], 4))
    elif change == "which is better":
        turned = [row | {"signs": [-sign for sign in row["signs"]]} for row in rows.train]
        rows = replace(rows, train=Dataset.from_list(turned))
    elif change == "base":
        recipe = replace(recipe, model=replace(recipe.model, name=str(small_model("llama", initializer_range=0.2))))
    elif change == "RoPE":
        recipe = replace(recipe, model=replace(recipe.model, rope_scaling={"rope_type": "linear", "factor": 2.0}))
    elif change == "bits":
        recipe = replace(recipe, model=replace(recipe.model, bits=4))
    else:
        recipe = replace(recipe, preference=KTO)
    referenced(recipe, rows)
    assert len(list(Path(".cache/references").iterdir())) == 2


def test_a_disk_that_is_full_is_a_warning(small_llama, tmp_path, capsys):
    Path(".cache").write_text("a file in the place of the folder")
    rows, _ = referenced(made_recipe(small_llama, tmp_path / "run", DPO))
    assert "reference" in rows.train.column_names
    assert "warning: the reference is not kept for the next start" in capsys.readouterr().out


def test_only_the_newest_files_stay(small_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "MAX_REFERENCES", 1)
    for spec in (DPO, KTO):
        referenced(made_recipe(small_llama, tmp_path / "run", spec))
    assert len(list(Path(".cache/references").iterdir())) == 1


def test_a_likelihood_that_is_no_number_is_refused_before_the_first_step(small_llama, tmp_path):
    recipe = made_recipe(small_llama, tmp_path / "run", DPO)
    model, tokenizer, rows, recipe, plan = prepare_by_hand(recipe)
    token = rows.train[1]["input_ids"][-1]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    recipe = replace(recipe, data=replace(recipe.data, source=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(UserError, match="gives no finite log-likelihood for|there is no"):
        with_reference(model, tokenizer, rows, recipe, plan)
    assert not Path(".cache").exists()


def test_out_of_memory_it_takes_smaller_micro_batches(small_llama, tmp_path, capsys):
    recipe = made_recipe(small_llama, tmp_path / "run", DPO)
    expected, _ = referenced(recipe)
    shutil.rmtree(".cache")
    model, tokenizer, rows, recipe, plan = prepare_by_hand(recipe)

    def check(_, arguments) -> None:
        if arguments[0].shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory, injected")

    decoder_layers(model)[0].register_forward_pre_hook(check)
    found = with_reference(model, tokenizer, rows, recipe, replace(plan, reference_rows=4))
    for got, wanted in zip(found.train["reference"], expected.train["reference"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)


def test_out_of_memory_with_a_single_row_is_one_line(small_llama, tmp_path):
    model, tokenizer, rows, recipe, plan = prepare_by_hand(made_recipe(small_llama, tmp_path / "run", DPO))

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory, injected")

    decoder_layers(model)[0].register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="out of GPU memory while the reference is computed, before the first step"):
        with_reference(model, tokenizer, rows, recipe, plan)


def test_a_run_from_an_adapter_compares_with_that_one_as_it_was(small_llama, tmp_path):
    first = made_recipe(small_llama, tmp_path / "first", DPO)
    train(*prepare_by_hand(first))
    lora = replace(first.lora, start_from=first.out)
    second = replace(first, lora=lora, out=str(tmp_path / "second"))
    train(*prepare_by_hand(second))
    before = read_metrics(Path(second.out))[0]
    # Nothing has moved before the first step: log 2, and every comparison is a tie
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert before["eval_rewards/accuracies"] == 0.5
    assert len(list(Path(".cache/references").iterdir())) == 2
    held_out = Dataset.from_parquet(str(Path(second.out) / HELD_OUT_ROWS))
    ended = read_metrics(Path(first.out))[-1]
    assert ended["eval_rewards/margins"] != 0.0
    assert "reference" in held_out.column_names
