from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from common.cli import run
from common.machine.device import Machine
from common.machine.layout import Layout
from common.model.activation_checkpointing import TRAINER_FLAG, Policy, decoder_layers
from common.plan.plan import Plan
from common.run import trainer_config as module
from common.run.trainer_config import build_trainer, trainer_config
from tests.run.test_training import prepare, split


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
    assert names <= {
        "DefaultFlowCallback",
        "_RehearseFirst",
        "RecomputeCheck",
        "HeldOutDecisions",
        "ProgressCallback",
    }, names


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {TRAINER_FLAG: True},
        {TRAINER_FLAG: True, f"{TRAINER_FLAG}_kwargs": {"use_reentrant": True}},
        {TRAINER_FLAG: False, f"{TRAINER_FLAG}_kwargs": {"use_reentrant": True}},
    ],
    ids=["ours", "all layers", "all layers, reentrant", "no layer, reentrant"],
)
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_settings_of_the_trainer_change_no_layers_recompute_or_the_run_stops(recipe, settings, kept):
    """Each layer runs in the last step as the plan says, with evaluations and checkpoints in between."""
    recipe = replace(recipe, train=replace(recipe.train, max_steps=3, eval_every=1, save_every=1))
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, 4, Policy(2, kept)))
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    runs = [0, 0]

    def counting(index):
        def count(*_):
            if model.training and trainer.state.global_step == 2:
                runs[index] += 1

        return count

    for index, layer in enumerate(decoder_layers(model)):
        layer.self_attn.register_forward_pre_hook(counting(index))
    try:
        trainer.train()
    except RuntimeError as error:
        assert settings and "activation checkpointing" in str(error)
    else:
        assert runs == [1 if index >= 2 - kept else 2 for index in range(2)]


def test_one_process_that_sees_two_gpus_trains_on_the_first(recipe, monkeypatch):
    """A script or a test of one's own: commands hide the others. TRL refuses what the stock trainer would do."""
    gpu = Machine(torch.device("cuda", 0), torch.bfloat16, "it is faked", "Faked GPU")
    monkeypatch.setattr(module, "this_machine", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    try:
        plan = Plan(1, 4, Layout(), Policy(2), "a test")
        config = trainer_config(recipe.train, plan, Path(recipe.out), evaluates=False)
        assert (config.device.type, config.n_gpu, config.train_batch_size) == ("cuda", 1, 1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
