"""A run goes on from its own checkpoint only: PITFALLS row 27 and what may change all the same."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainerState

from common.recipe import LoraSpec, UserError
from common.run.checkpoints import read_run_identity
from common.run.metrics_file import read_metrics
from common.run.resume import checkpoint_to_resume, finished_state, refuse_another_run, run_identity
from common.run.training import train
from tests.conftest import small_recipe
from tests.run.test_training import prepare


@pytest.fixture(scope="module")
def finished(small_llama, tmp_path_factory):
    """A run that has three checkpoints behind it."""
    recipe = small_recipe(small_llama, tmp_path_factory.mktemp("finished"))
    recipe = replace(recipe, train=replace(recipe.train, save_every=1))
    train(*prepare(recipe))
    return recipe


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of that run, to be resumed; its data are the same file."""
    shutil.copytree(finished.out, tmp_path / "run")
    return replace(finished, out=str(tmp_path / "run"), existing_run="resume")


def edited(recipe, **train_values):
    return replace(recipe, train=replace(recipe.train, **train_values))


def other_data(recipe, tmp_path):
    lines = Path(recipe.data.source).read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    return replace(recipe, data=replace(recipe.data, source=str(tmp_path / "other.jsonl")))


CHANGES = {
    "alpha": (lambda recipe, _: replace(recipe, lora=LoraSpec(4, 64)), "LoraSpec.alpha was 8 and is 64"),
    "rank": (lambda recipe, _: replace(recipe, lora=LoraSpec(8, 8)), "LoraSpec.rank was 4 and is 8"),
    "learning rate": (
        lambda recipe, _: edited(recipe, learning_rate=1e-4),
        "TrainSpec.learning_rate was 0.005 and is 0.0001",
    ),
    "seed": (lambda recipe, _: edited(recipe, seed=1), "TrainSpec.seed was 0 and is 1"),
    "optimizer": (
        lambda recipe, _: edited(recipe, optimizer="adamw_8bit"),
        "TrainSpec.optimizer was 'adamw_torch_fused' and is 'adamw_8bit'",
    ),
    "data": (other_data, "DataSpec.source was "),
    "RoPE": (
        lambda recipe, _: replace(
            recipe, model=replace(recipe.model, rope_scaling={"rope_type": "linear", "factor": 2})
        ),
        "ModelSpec.rope_scaling was None and is {'rope_type': 'linear', 'factor': 2.0}",
    ),
    "configuration": (
        lambda recipe, _: replace(recipe, data=replace(recipe.data, config="main")),
        "DataSpec.config was None and is 'main'",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_pitfall_27_resuming_with_another_setting_is_refused_and_names_it(stopped, tmp_path, change):
    alter, words = CHANGES[change]
    with pytest.raises(UserError) as error:
        train(*prepare(alter(stopped, tmp_path)))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{stopped.out}/checkpoints/checkpoint-3 belongs to another run:"
    assert any(line.startswith(f"  {words}") for line in lines[1:-1]), lines
    assert lines[-1] == "Take that back to go on with it, or begin anew: ARGS=--overwrite"


def test_pitfall_27_the_same_file_with_other_content_is_refused(stopped):
    path = Path(stopped.data.source)
    before = path.read_text()
    path.write_text("\n".join(before.splitlines()[::-1]) + "\n")
    try:
        with pytest.raises(
            UserError, match="the data is not what it was: other rows, another tokenizer or chat template"
        ):
            train(*prepare(stopped))
    finally:
        path.write_text(before)  # other tests go on with it


def test_pitfall_27_another_version_of_a_library_is_said(stopped, capsys):
    model, tokenizer, rows, recipe, plan = prepare(stopped)
    old = run_identity(recipe, rows, plan) | {"plan": "1 x 16 rows"}
    new = copy.deepcopy(old) | {"plan": "2 x 8 rows"}
    old["versions"]["torch"] = "2.0"
    refuse_another_run(old, new, "checkpoint-3")
    out = capsys.readouterr().out
    assert f"warning: torch was 2.0 and is {new['versions']['torch']}; the run goes on" in out
    assert "warning: the plan was 1 x 16 rows and is 2 x 8 rows; the run goes on" in out


@pytest.mark.parametrize(
    "free", [{"checkpointing": "every layer"}, {"eval_every": 7}, {"save_every": 9}], ids=lambda free: next(iter(free))
)
def test_what_does_not_change_the_result_may_change(stopped, free, capsys):
    train(*prepare(edited(stopped, **free)))
    out = capsys.readouterr().out
    assert "going on from" in out
    assert "warning" not in out


def test_more_steps_are_a_longer_run_and_said(stopped, capsys):
    metrics = train(*prepare(edited(stopped, max_steps=5)))
    assert metrics["steps"] == 5
    assert "warning: TrainSpec.max_steps was 3 and is 5; the run goes on, and ends" in capsys.readouterr().out


def test_a_finished_run_is_resumed_to_the_same_end_and_said(stopped, capsys):
    before = (Path(stopped.out) / "adapter_model.safetensors").read_bytes()
    metrics = train(*prepare(stopped))
    assert metrics["steps"] == 3
    assert (Path(stopped.out) / "adapter_model.safetensors").read_bytes() == before
    assert "the run had ended, after step 3: nothing is trained" in capsys.readouterr().out


# 72 packed rows, 16 a step: 5 steps an epoch.
LENGTHS = [
    pytest.param({"max_steps": 2, "epochs": 2.0, "lr_schedule": "constant"}, 2, id="fewer steps than the epochs have"),
    pytest.param({"epochs": 1.4}, 7, id="epochs and a part"),
    pytest.param({"max_steps": 6, "epochs": 1.0}, 6, id="more steps than the epochs have", marks=pytest.mark.slow),
    pytest.param({"epochs": 2.0, "lr_schedule": "linear"}, 10, id="epochs", marks=pytest.mark.slow),
    pytest.param({"epochs": 0.4, "lr_schedule": "constant"}, 2, id="a part of an epoch", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("values", "steps"), LENGTHS)
def test_a_finished_run_is_the_same_after_each_resume(recipe, values, steps):
    recipe = edited(recipe, rows_per_step=16, **{"max_steps": None} | values)
    assert train(*prepare(recipe))["steps"] == steps
    before = what_a_run_left(recipe)
    for _ in range(2):
        assert train(*prepare(replace(recipe, existing_run="resume")))["steps"] == steps
        assert what_a_run_left(recipe) == before


def what_a_run_left(recipe):
    """The bytes of its adapter and metrics, and what run.json says but for the time and the memory of the process."""
    folder = Path(recipe.out)
    run = json.loads((folder / "run.json").read_text())
    for name in ("finished", "command"):
        del run[name]
    for name in ("peak_gib", "allocated_bytes"):
        del run["metrics"][name]
    del run["recipe"]["existing_run"]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    files = [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "metrics.jsonl")]
    return run, checkpoints, files


@pytest.mark.parametrize(("steps", "finished"), [(9, True), (10, True), (11, False)])
def test_a_run_is_finished_when_its_checkpoint_leaves_no_step(tmp_path, steps, finished):
    TrainerState(global_step=10, max_steps=10, num_train_epochs=1).save_to_json(str(tmp_path / "trainer_state.json"))
    state = finished_state(tmp_path, steps)
    assert (state is not None and state.global_step == 10) == finished


def test_a_run_that_goes_on_beyond_its_end_learns_in_each_step(recipe):
    recipe = edited(recipe, rows_per_step=16, max_steps=2, epochs=1.0, lr_schedule="linear", warmup_ratio=0.0)
    train(*prepare(recipe))
    assert train(*prepare(replace(edited(recipe, max_steps=None), existing_run="resume")))["steps"] == 5
    rates = [entry["learning_rate"] for entry in read_metrics(Path(recipe.out)) if "loss" in entry]
    # The first two steps fell towards the end of a run of 2 steps, the others are those of a run of 5.
    assert [rate / recipe.train.learning_rate for rate in rates] == pytest.approx([1, 1 / 2, 3 / 5, 2 / 5, 1 / 5])


def test_the_newest_intact_checkpoint_is_resumed_and_damaged_ones_are_removed(stopped, capsys):
    folder = Path(stopped.out) / "checkpoints"
    run = read_run_identity(folder / "checkpoint-3")
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    assert checkpoint_to_resume(folder, run) == folder / "checkpoint-2"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert capsys.readouterr().out.endswith(f"going on from {folder}/checkpoint-2\n")


def moved(recipe, folder: Path):
    """The recipe with its data at another place."""
    shutil.copy(recipe.data.source, folder / "moved.jsonl")
    return replace(recipe, data=replace(recipe.data, source=str(folder / "moved.jsonl")))


def test_a_run_goes_on_with_its_data_and_its_base_under_other_names(stopped, tmp_path, capsys):
    """The data are at another place; the base is the same folder, typed in another way."""
    recipe = moved(stopped, tmp_path)
    train(*prepare(replace(recipe, model=replace(recipe.model, name=f"{recipe.model.name}/"))))
    out = capsys.readouterr().out
    line = f"DataSpec.source was {stopped.data.source!r} and is {recipe.data.source!r}: its content is the same"
    assert out.count(line) == 1 and "ModelSpec.name" not in out
    assert "going on from" in out


def test_a_run_goes_on_with_its_data_cut_into_shards(stopped, tmp_path, capsys):
    lines = Path(stopped.data.source).read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:50]))
    (tmp_path / "b.jsonl").write_text("".join(lines[50:]))
    source = f"{tmp_path}/a.jsonl {tmp_path}/b.jsonl"
    train(*prepare(replace(stopped, data=replace(stopped.data, source=source))))
    assert f"and is {source!r}: its content is the same" in capsys.readouterr().out


@pytest.fixture(scope="module")
def identity(finished):
    model, tokenizer, rows, recipe, plan = prepare(finished)
    return run_identity(replace(recipe, data=replace(recipe.data, eval_source="held_out.jsonl")), rows, plan)


def renamed(identity, field: str, name: object, **hashes: str):
    return identity | {"recipe": identity["recipe"] | {field: name}} | hashes


@pytest.mark.parametrize(
    ("field", "hashes", "is_refused"),
    [
        ("DataSpec.source", {}, False),
        ("DataSpec.source", {"held_out": "other"}, False),
        ("DataSpec.source", {"rows": "other"}, True),
        ("DataSpec.eval_source", {}, False),
        ("DataSpec.eval_source", {"held_out": "other"}, True),
        ("ModelSpec.name", {}, True),  # nothing says what that folder holds
    ],
)
def test_what_moved_is_refused_unless_it_is_known_to_be_the_same(identity, capsys, field, hashes, is_refused):
    new = renamed(identity, field, "/elsewhere/it", **hashes)
    if is_refused:
        with pytest.raises(UserError, match=f"{field} was .* and is '/elsewhere/it'"):
            refuse_another_run(identity, new, "checkpoint-3")
    else:
        refuse_another_run(identity, new, "checkpoint-3")
        assert f"{field} was " in capsys.readouterr().out


def mixed(recipe, *weights: float):
    """The recipe with a mixture of its data and a copy of it."""
    path = Path(recipe.data.source).with_name("copy.jsonl")
    shutil.copy(recipe.data.source, path)
    sources = ((recipe.data.source, weights[0]), (str(path), weights[1]))
    return replace(recipe, data=replace(recipe.data, source="", sources=sources))


def test_a_mixture_goes_on_exactly_and_no_other_one_does(finished, tmp_path, capsys):
    constant = edited(mixed(finished, 1, 2), lr_schedule="constant", warmup_ratio=0.0)  # whatever the last step is
    begun = replace(edited(constant, max_steps=2), out=str(tmp_path / "run"))
    begun = replace(begun, existing_run="refuse")
    train(*prepare(begun))
    more = edited(begun, max_steps=3)
    whole = replace(more, out=str(tmp_path / "whole"))
    train(*prepare(whole))
    with pytest.raises(UserError, match=r"DataSpec.sources was \[\[.* 2\]\] and is \[\[.* 4\]\]"):
        train(*prepare(replace(mixed(finished, 1, 4), train=more.train, out=more.out, existing_run="resume")))
    train(*prepare(replace(more, existing_run="resume")))
    assert "going on from" in capsys.readouterr().out
    steps = [read_steps(folder) for folder in (more.out, whole.out)]
    assert steps[0][-1] == steps[1][-1]


def read_steps(folder: str) -> list[float]:
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_checkpoint_of_a_version_that_did_not_know_a_field_has_its_default(identity, capsys):
    old = renamed(identity, "x", None)
    old["recipe"] = {name: value for name, value in identity["recipe"].items() if name != "DataSpec.sources"}
    refuse_another_run(old, identity, "checkpoint-3")
    assert capsys.readouterr().out == ""


def test_a_checkpoint_without_a_hash_of_the_held_out_rows_is_no_proof(identity, capsys):
    old = {name: value for name, value in identity.items() if name != "held_out"}
    refuse_another_run(old, identity, "checkpoint-3")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="DataSpec.eval_source was "):
        refuse_another_run(old, renamed(identity, "DataSpec.eval_source", "/elsewhere/it"), "checkpoint-3")


def test_other_held_out_rows_at_the_same_place_are_said(identity, capsys):
    refuse_another_run(identity, identity | {"held_out": "other"}, "checkpoint-3")
    assert capsys.readouterr().out.startswith("warning: the held-out rows are not what they were")
