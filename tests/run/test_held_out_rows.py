"""What a run held out stays held out, whatever becomes of its data file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.cli import run_command
from common.data.rows import load_rows
from common.recipe import UserError
from common.run.held_out_rows import has_changed, load_held_out_rows, save_held_out_rows
from common.run.training import train
from common.sources.fingerprint import source_state
from tests.conftest import small_recipe
from tests.run.test_training import prepare


@pytest.fixture(scope="module")
def trained(small_llama, tmp_path_factory):
    """A run that held 20 rows out, and the losses that it measured."""
    recipe = small_recipe(small_llama, tmp_path_factory.mktemp("trained"))
    return recipe, train(*prepare(recipe))


@pytest.fixture
def ended(trained, tmp_path):
    """A copy of that run with a data file of its own."""
    recipe, _ = trained
    shutil.copytree(recipe.out, tmp_path / "run")
    data = shutil.copy(recipe.data.source, tmp_path / "chats.jsonl")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    run["recipe"]["data"]["source"] = run["data"][0]["source"] = str(data)
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    return replace(recipe, out=str(tmp_path / "run"), data=replace(recipe.data, source=str(data)))


def token_ids(rows):
    return sorted(map(tuple, rows["input_ids"]))


CHANGES = {
    "a row is lost": lambda lines: lines[1:],
    "a row is new": lambda lines: [lines[-1], *lines],
    "the order is another": lambda lines: lines[::-1],
    "there is nothing left": lambda lines: [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_make_eval_takes_the_rows_that_were_never_trained_on(trained, ended, change, capsys):
    path = Path(ended.data.source)
    assert run_command("eval", "x", ended, ["--samples", "0"]) == 0
    assert "has changed since the run" not in capsys.readouterr().out
    path.write_text("".join(CHANGES[change](path.read_text().splitlines(keepends=True))))
    assert run_command("eval", "x", ended, ["--samples", "0"]) == 0
    assert f"{path} has changed since the run: the rows are those that it held out" in capsys.readouterr().out
    told = json.loads((Path(ended.out) / "eval.json").read_text())
    assert told["adapter"]["loss"] == pytest.approx(trained[1]["eval_loss"], rel=1e-4)
    assert told["base"]["loss"] == pytest.approx(trained[1]["eval_loss_before"], rel=1e-4)


@pytest.mark.parametrize("source", ["{0}/a.jsonl {0}/b.jsonl", "{0}", "{0}/*.jsonl"])
def test_of_several_files_any_may_have_changed(source, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    source = source.format(tmp_path)
    entry = {"source": source, "sha256": source_state(source).sha256}
    assert not has_changed(entry)
    (tmp_path / "b.jsonl").write_text("c")
    assert has_changed(entry) and not has_changed(entry | {"sha256": None})
    (tmp_path / "b.jsonl").unlink()
    assert has_changed(entry) == (" " not in source)  # a file that was named is not there: nobody knows


def test_the_rows_are_there_from_before_the_first_step_and_as_they_were(recipe, tmp_path):
    _, tokenizer, rows, recipe, _ = prepare(recipe)
    save_held_out_rows(rows.evaluation, tmp_path / "run")
    kept = load_held_out_rows(tmp_path / "run")
    assert kept.to_dict() == rows.evaluation.to_dict()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["held_out.parquet"]
    assert not set(token_ids(kept)) & set(token_ids(load_rows(recipe.data, tokenizer, 128).train))


@pytest.mark.parametrize("damage", [b"", b"PAR1 and so on"])
def test_damaged_rows_are_one_line(ended, damage, capsys):
    (Path(ended.out) / "held_out.parquet").write_bytes(damage)
    with pytest.raises(UserError, match="held_out.parquet is damaged"):
        load_held_out_rows(Path(ended.out))
    assert run_command("eval", "x", ended, []) == 2
    assert "name rows to evaluate on: DATA=held_out.jsonl" in capsys.readouterr().err
    assert not (Path(ended.out) / "eval.json").exists()


def test_a_run_without_its_held_out_rows_draws_none_again(ended, capsys):
    (Path(ended.out) / "held_out.parquet").unlink()
    assert run_command("eval", "x", ended, []) == 2
    assert "has no held-out rows; name a file or a hub data set" in capsys.readouterr().err


def test_other_held_out_rows_are_said_when_a_run_goes_on(recipe, tmp_path, capsys):
    lines = Path(recipe.data.source).read_text().splitlines(keepends=True)
    (tmp_path / "held_out.jsonl").write_text("".join(lines[:30]))
    data = replace(recipe.data, eval_source=str(tmp_path / "held_out.jsonl"))
    recipe = replace(recipe, data=data, train=replace(recipe.train, max_steps=1))
    train(*prepare(recipe))
    (tmp_path / "held_out.jsonl").write_text("".join(lines[:29]))
    train(*prepare(replace(recipe, existing_run="resume")))
    assert "warning: the held-out rows are not what they were" in capsys.readouterr().out
