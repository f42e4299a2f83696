"""What `make finetune ARGS=--overwrite` does to the run that is there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.cli import run_command
from common.run.training import train
from tests.run.test_training import prepare


@pytest.fixture
def finished(recipe):
    """A recipe whose run is there, with two steps."""
    recipe = replace(recipe, train=replace(recipe.train, sample_answers=0))
    assert finetune(recipe, "--max-steps", "2") == 0
    return recipe


def finetune(recipe, *flags: str) -> int:
    return run_command("finetune", "x", recipe, ["--out", recipe.out, *flags], lambda given: train(*prepare(given)))


def steps(recipe) -> int:
    return json.loads((Path(recipe.out) / "run.json").read_text())["recipe"]["train"]["max_steps"]


@pytest.mark.parametrize("mistake", ["no such file", "no data in it", "no such module"])
def test_a_mistake_in_the_new_run_costs_nothing_of_the_old(finished, mistake, tmp_path, capsys):
    before = {path: path.read_bytes() for path in Path(finished.out).rglob("*") if path.is_file()}
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    flags = {"no such file": ["--data", "gone.jsonl"], "no data in it": ["--data", str(tmp_path / "bad.csv")]}
    new = (
        replace(finished, lora=replace(finished.lora, target_modules=("w_pack",))) if "module" in mistake else finished
    )
    assert finetune(new, "--overwrite", *flags.get(mistake, [])) == 2
    assert f"the run that was to be replaced is back in {finished.out}" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path(finished.out).rglob("*") if path.is_file()} == before


def test_a_run_that_ends_well_replaces_the_old_one(finished):
    assert finetune(finished, "--overwrite", "--max-steps", "1") == 0
    assert steps(finished) == 1
    assert not list(Path(finished.out).glob(".replaced*"))


def test_ctrl_c_before_the_first_checkpoint_names_none_of_the_old_run(finished, capsys):
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    named = (
        f"stopped at once; the newest checkpoint is {finished.out}/checkpoints/checkpoint-2. Go on with: make finetune"
    )
    for flag in ("--resume", "--overwrite"):
        capsys.readouterr()
        assert run_command("finetune", "x", finished, ["--out", finished.out, flag], interrupt) == 130
        said = capsys.readouterr().err
        assert named in said if flag == "--resume" else said == "\nstopped\n"
