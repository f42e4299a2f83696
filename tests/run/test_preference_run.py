"""Whole runs with preferences: what they show, leave and refuse."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.adapter.find import find_adapter
from common.data.rows import Rows
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.recipe import PreferenceSpec, UserError
from common.run.compare import as_text, compare_runs
from common.run.evaluation import compare_with_base, print_evaluation
from common.run.held_out_rows import load_held_out_rows
from common.run.metrics_file import read_metrics
from common.run.report import write_report
from common.run.training import train
from tests.conftest import FP32
from tests.machine.test_processes import CPU, launcher
from tests.run.preference_rows import Exact, answers_of, made_recipe, made_rows, pack_by_hand, prepare_by_hand
from tests.run.test_training import adapter


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """References are kept in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(small_llama, tmp_path_factory):
    """A recipe whose run has ended, and its metrics."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = made_recipe(small_llama, folder / "run", PreferenceSpec("dpo"), max_steps=6, save_every=2)
        metrics = train(*prepare_by_hand(recipe))
    return recipe, metrics


def test_metrics_jsonl_has_rewards_margin_and_accuracy_of_each_step_and_of_the_held_out_rows(finished):
    entries = read_metrics(Path(finished[0].out))
    names = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "nll/chosen",
        "nll/rejected",
    }
    for entry in entries:
        prefix = "eval_" if "eval_loss" in entry else ""
        assert {prefix + name for name in names} <= entry.keys()
        margin = entry[f"{prefix}rewards/chosen"] - entry[f"{prefix}rewards/rejected"]
        assert entry[f"{prefix}rewards/margins"] == pytest.approx(margin)
    assert entries[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert entries[0]["eval_rewards/accuracies"] == 0.5
    assert entries[-1]["eval_rewards/margins"] > 0.001


def test_the_held_out_metrics_are_those_of_the_formula_in_float64(finished):
    recipe, metrics = finished
    names = adapter(recipe.out)
    weights = {name.replace(".weight", ".default.weight"): tensor for name, tensor in names.items()}
    exact, rows = Exact(recipe.model.name, weights, recipe.lora), made_rows(recipe.preference).evaluation
    answers = answers_of(rows)
    assert metrics["eval_loss"] == pytest.approx(exact.loss(answers, recipe.preference).item(), rel=1e-5)
    ratios = [
        [(exact.likelihood(*each[:2]) - exact.reference(*each[:2])).item() for each in row[start : start + 2]]
        for row in answers
        for start in range(0, len(row), 2)
    ]
    after = metrics["held_out_preferences"]["after"]
    chosen, rejected = (0.1 * sum(side) / len(ratios) for side in zip(*ratios, strict=True))
    assert after["rewards/chosen"] == pytest.approx(chosen, abs=1e-5)
    assert after["rewards/rejected"] == pytest.approx(rejected, abs=1e-5)
    assert after["rewards/accuracies"] == sum(a > b for a, b in ratios) / len(ratios)


def test_the_progress_line_has_accuracy_and_margin(small_llama, tmp_path, capsys):
    train(*prepare_by_hand(made_recipe(small_llama, tmp_path / "run", PreferenceSpec("dpo"))))
    out = capsys.readouterr().out
    assert "step 0: held-out loss 0.6931 | accuracy 50% | margin 0.000" in out
    (line,) = [line for line in out.splitlines() if line.startswith("step 3/3")]
    assert " | accuracy " in line and " | margin " in line


def test_run_json_says_what_was_preferred_and_the_recipe_comes_back_from_it(finished):
    recipe, metrics = finished
    run = json.loads((Path(recipe.out) / "run.json").read_text())
    assert run["recipe"]["preference"]["loss"] == "dpo"
    assert run["metrics"]["held_out_preferences"] == metrics["held_out_preferences"]
    assert run["metrics"]["held_out_preferences"]["before"]["rewards/accuracies"] == 0.5
    found = find_adapter(replace(recipe, preference=None)).recipe
    assert found.preference == recipe.preference and found.data.kind == "pairs"


def test_the_report_shows_rewards_margin_and_accuracy(finished):
    page = write_report(Path(finished[0].out)).read_text()
    for title in (
        "Comparisons that come out right",
        "Rewards",
        "Margin",
        "Negative log-likelihood",
        "Held-out rewards",
    ):
        assert f"<h3>{title}" in page
    assert "held-out accuracy" in page and "50.0 →" in page
    assert "perplexity" not in page and "nats per trained token" not in page
    assert "dpo: beta 0.1" in page
    card = (Path(finished[0].out) / "README.md").read_text()
    assert "| objective | dpo, on pairs of a better and a worse answer |" in card
    assert "- dpo" in card and "- sft" not in card


def test_make_eval_measures_the_losses_that_the_run_did(finished, capsys):
    recipe, metrics = finished
    model, tokenizer, *_ = prepare_by_hand(recipe)
    weights = adapter(recipe.out)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name.replace(".default", "")])
    held_out = load_held_out_rows(Path(recipe.out))
    result = compare_with_base(model, tokenizer, held_out, [], preference=recipe.preference)
    assert result["adapter"]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert result["base"]["loss"] == pytest.approx(0.693147, abs=1e-6)
    after = metrics["held_out_preferences"]["after"]
    assert result["adapter"]["rewards/accuracies"] == after["rewards/accuracies"]
    again = compare_with_base(model, tokenizer, held_out.remove_columns("reference"), [], preference=recipe.preference)
    assert again["adapter"] == pytest.approx(result["adapter"], abs=1e-6)
    print_evaluation({"source": "held out", **result})
    assert "accuracy" in capsys.readouterr().out


def test_runs_with_other_preferences_side_by_side(finished, small_llama, tmp_path):
    recipe, _ = finished
    other = replace(recipe, preference=PreferenceSpec("simpo"), out=str(tmp_path / "simpo"))
    train(*prepare_by_hand(other))
    comparison = compare_runs([Path(recipe.out), Path(other.out)])
    assert ("preference.loss", ["dpo", "simpo"]) in comparison.differences
    text = as_text(comparison, 120)
    assert "held-out accuracy" in text and "50.0% → " in text
    assert "Losses are of other objectives (PreferenceSpec), so they do not compare" in text


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (PreferenceSpec("dpo", beta=0.2), "PreferenceSpec.beta was 0.1 and is 0.2"),
        (PreferenceSpec("ipo"), "PreferenceSpec.loss was 'dpo' and is 'ipo'"),
        (PreferenceSpec("dpo", sft_weight=0.1), "PreferenceSpec.sft_weight was 0.0 and is 0.1"),
    ],
)
def test_resuming_with_another_preference_is_refused(finished, spec, line):
    recipe = replace(finished[0], preference=spec, existing_run="resume")
    with pytest.raises(UserError, match=line):
        train(*prepare_by_hand(recipe))


def test_resuming_with_the_default_written_out_is_the_same_run(finished, capsys):
    recipe = replace(finished[0], preference=PreferenceSpec("dpo", beta=0.1), existing_run="resume")
    train(*prepare_by_hand(recipe))
    assert "the run had ended, after step 6: nothing is trained" in capsys.readouterr().out


def test_pairs_that_are_turned_round_are_another_run(finished):
    recipe = replace(finished[0], existing_run="resume")
    rows = made_rows(recipe.preference)
    turned = rows.train.map(lambda row: {"signs": [-sign for sign in row["signs"]]})
    with pytest.raises(UserError, match="the data is not what it was"):
        train(*prepare_by_hand(recipe, rows=Rows(turned, rows.evaluation, [], kind="pairs")))


def test_the_best_step_by_the_held_out_loss_is_kept_and_its_accuracy_is_told(small_llama, tmp_path):
    spec = PreferenceSpec("dpo", beta=5.0)  # too large a step makes it worse
    values = {"keep": "best", "eval_every": 1, "patience": 3, "max_steps": 8, "learning_rate": 0.05}
    recipe = made_recipe(small_llama, tmp_path / "run", spec, **values)
    metrics = train(*prepare_by_hand(recipe))
    entries = [entry for entry in read_metrics(Path(recipe.out)) if "eval_loss" in entry]
    best = min(entries[1:], key=lambda entry: entry["eval_loss"])
    assert metrics["kept_step"] == best["step"]
    after = metrics["held_out_preferences"]["after"]
    assert after["rewards/margins"] == best["eval_rewards/margins"]


def test_a_step_without_finite_numbers_is_skipped_and_not_counted(small_llama, tmp_path, capsys):
    recipe = made_recipe(small_llama, tmp_path / "run", PreferenceSpec("orpo"), max_steps=3)
    model, tokenizer, rows, recipe, plan = prepare_by_hand(recipe)
    token = rows.train[0]["input_ids"][-1]
    calls = []

    def poison(_, arguments, output) -> torch.Tensor:
        if torch.is_grad_enabled() and (arguments[0] == token).any():
            calls.append(1)
            return output.masked_fill((arguments[0] == token)[..., None], torch.nan)
        return output

    rows = Rows(rows.train, None, [], kind="pairs")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hello", "chosen": "Hi!", "rejected": "What?"}\n')
    recipe = replace(recipe, data=replace(recipe.data, source="pairs.jsonl"))
    model.get_input_embeddings().register_forward_hook(poison)
    train(model, tokenizer, rows, recipe, plan)
    assert calls
    out, entries = capsys.readouterr().out, read_metrics(Path(recipe.out))
    assert "the step is skipped" in out
    assert any("skipped" in entry for entry in entries)
    assert all(entry["rewards/margins"] == entry["rewards/margins"] for entry in entries if "loss" in entry)  # no NaN


@pytest.mark.parametrize("bits", [4, 16])
def test_the_reference_is_what_training_computes_before_the_first_step(bits, small_llama, tmp_path):
    """Rewards of 0, so a loss of log 2: other numbers in evaluation than in training would be a reward of nothing."""
    recipe = made_recipe(small_llama, tmp_path / "run", PreferenceSpec("dpo", beta=5.0), max_steps=1)
    train(*prepare_by_hand(replace(recipe, model=replace(recipe.model, bits=bits))))
    before, first, _ = read_metrics(Path(recipe.out))
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert abs(first["rewards/chosen"]) < 1e-4


def test_rows_of_single_answers_have_nothing_for_kto_to_compare_with(small_llama, tmp_path):
    """z is then 0, in training and held out, and the run goes on."""
    spec = PreferenceSpec("kto")
    recipe = made_recipe(small_llama, tmp_path / "run", spec)
    answers = [answer for row in answers_of(made_rows(spec).train) for answer in row]
    rows = Rows(pack_by_hand(answers[:12], 1), pack_by_hand(answers[12:15], 1), [], kind="rated")
    train(*prepare_by_hand(recipe, rows=rows))
    assert [entry["kl"] for entry in read_metrics(Path(recipe.out)) if "kl" in entry] == [0.0] * 3
    assert load_held_out_rows(Path(recipe.out))["kl_reference"][:] == [[]] * 3


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from common.machine.collectives import init_distributed, shut_down_distributed
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy
from common.machine.processes import world_size
from common.plan.plan import Plan
from common.recipe import PreferenceSpec
from common.run.training import train
from tests.run.preference_rows import made_recipe, prepare_by_hand

folder, out, loss, sharded = sys.argv[1:]
init_distributed()
recipe = made_recipe(Path(folder), Path(out), PreferenceSpec(loss), max_steps=3)
layout = Layout(world_size(), sharded=sharded == "sharded" and world_size() > 1)
model, tokenizer, rows, recipe, plan = prepare_by_hand(recipe, 1, layout=layout)
plan = replace(plan, accumulation=4 // world_size(), layout=layout)
train(model, tokenizer, rows, recipe, plan)
shut_down_distributed()
"""


@pytest.mark.slow  # 80 s: six runs, each with torch's start
@pytest.mark.parametrize(("loss", "sharded"), [("dpo", "whole"), ("kto", "whole"), ("kto", "sharded")])
def test_two_processes_learn_what_one_does(loss, sharded, small_llama, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        command = [sys.executable, *launcher(processes), str(tmp_path / "script.py")]
        given = subprocess.run(
            [*command, str(small_llama), str(folder / "run"), loss, sharded],
            capture_output=True,
            text=True,
            cwd=folder,
            env=CPU,
            timeout=200,
        )
        assert given.returncode == 0, given.stderr[-3000:]
    alone, together = (tmp_path / name / "run" for name in ("1", "2"))
    for one, two in zip(read_metrics(alone), read_metrics(together), strict=True):
        for name in (name for name in one if "loss" in name or "/" in name or name == "kl"):
            assert two[name] == pytest.approx(one[name], abs=2e-5), name
    weights = adapter(together)
    for name, tensor in adapter(alone).items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-4)
    assert len(list((tmp_path / "2" / ".cache" / "references").iterdir())) == 1


def test_an_adapter_of_preferences_is_an_adapter_like_any_other(finished):
    recipe, _ = finished
    lora = replace(recipe.lora, start_from=recipe.out)
    model = attach_lora(load_4bit(recipe.model, FP32), lora)
    weights = adapter(recipe.out)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, weights[name.replace(".default", "")])
