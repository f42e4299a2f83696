"""The steps that are announced are those that transformers' trainer takes."""

import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from common.data.steps import count_steps, few_steps_warning, settle_rows_per_step, step_lines, steps_per_epoch
from common.recipe import TrainSpec, UserError

TRAIN = TrainSpec(seq_len=128, rows_per_step=4, learning_rate=1e-3)


@pytest.mark.parametrize("rows", [1, 4, 5, 386])
@pytest.mark.parametrize("epochs", [1.0, 2.5, 0.3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_trainer_takes_as_many(tmp_path, rows, epochs, micro_batch):
    train = replace(TRAIN, epochs=epochs)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=epochs,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=4 // micro_batch,
    )
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=Dataset.from_dict({"input": list(range(rows))}))
    *_, steps = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    assert count_steps(rows, train) == steps


def test_a_recipe_may_set_the_steps():
    assert count_steps(100, replace(TRAIN, max_steps=7)) == 7
    assert steps_per_epoch(100, replace(TRAIN, max_steps=7)) == 25


@pytest.mark.parametrize(
    ("rows", "values", "told"),
    [
        (400, {}, None),
        (399, {}, None),
        (396, {}, "takes 99 optimizer steps, .* rows_per_step=2: 198 optimizer steps; epochs=2: 198 optimizer steps; "),
        (46, {"rows_per_step": 16}, "takes 3 opt.*: rows_per_step=1: 46 .*; rows_per_step=1 and epochs=3: 138"),
        (46, {"rows_per_step": 16, "epochs": 40}, None),
        (46, {"rows_per_step": 16, "max_steps": 5}, None),
        (120, {"rows_per_step": 1, "epochs": 0.5}, "takes 60 optimizer steps, .*: epochs=1: 120 optimizer steps$"),
        (4, {}, "takes 1 optimizer step, .*: rows_per_step=1: 4 optimizer steps; rows"),
        (1, {"rows_per_step": 1}, "takes 1 optimizer step, .* add data$"),
    ],
)  # fmt: skip
def test_few_steps_are_warned_of_with_what_gives_more(rows, values, told):
    said = few_steps_warning(rows, replace(TRAIN, **values))
    assert said is None if told is None else re.search(told, said), said


@pytest.mark.parametrize("rows", [1, 7, 100, 199, 200, 201, 399, 1599, 1600, 5000])
@pytest.mark.parametrize("epochs", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_auto_takes_the_largest_number_that_gives_a_hundred_steps(rows, epochs, processes):
    auto = replace(TRAIN, rows_per_step="auto", epochs=epochs, learning_rate=1.6e-3)
    settled = settle_rows_per_step(auto, rows, processes)
    choices = [n for n in (16, 8, 4, 2, 1) if n % processes == 0]
    enough = [n for n in choices if math.ceil(epochs * math.ceil(rows / n)) >= 100]
    assert settled.rows_per_step == (max(enough) if enough else min(choices))
    assert settled.learning_rate == pytest.approx(1.6e-3 * math.sqrt(settled.rows_per_step / 16))
    assert settle_rows_per_step(replace(auto, max_steps=3), rows, processes).rows_per_step == settled.rows_per_step
    assert settle_rows_per_step(settled, rows, processes) is settled


def test_auto_says_what_it_chose():
    steps, chosen, *warning = step_lines(450, replace(TRAIN, rows_per_step="auto", learning_rate=2e-4))
    assert steps == "optimizer steps: 113 an epoch (450 packed rows, 4 a step); the run takes 113"
    assert 'chosen by rows_per_step="auto"; learning_rate 0.0002 × √(4/16) = 0.0001' in chosen
    assert not warning
    assert step_lines(1, TRAIN)[0] == "optimizer steps: 1 an epoch (1 packed row, 4 a step); the run takes 1"


def test_processes_that_cannot_share_any_number_are_told():
    with pytest.raises(UserError, match="3 processes cannot share them evenly: set a multiple of 3"):
        settle_rows_per_step(replace(TRAIN, rows_per_step="auto"), 100, 3)


@pytest.mark.parametrize("value", ["Auto", "16", 4.0, True, None, 0, -1])
def test_another_value_is_refused(value):
    with pytest.raises(UserError, match="TrainSpec.rows_per_step is"):
        replace(TRAIN, rows_per_step=value)
