from dataclasses import replace
from pathlib import Path

from common.cli import run
from common.run.trainer_config import build_trainer
from tests.run.test_training import prepare


def test_nothing_is_tracked_by_default(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe)
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    names = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert not {"TensorBoardCallback", "WandbCallback", "TrackioCallback"} & names


def test_a_tracker_that_is_not_installed_is_one_line(recipe, capsys):
    recipe = replace(recipe, train=replace(recipe.train, report_to="wandb"))
    assert run(lambda recipe: None, recipe, []) == 2
    assert "report_to is 'wandb', which is not installed: .venv/bin/pip install wandb" in capsys.readouterr().err


def test_no_report_service_is_told_of_a_run(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe)
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    assert trainer.args.report_to == []
    assert not trainer.args.push_to_hub
    names = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert names <= {"DefaultFlowCallback", "_RehearseFirst", "RecomputeCheck", "ProgressCallback"}, names
