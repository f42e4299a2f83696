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
        (396, {}, "99 opt.* rows_per_step=2 with learning_rate=0.000707: 198 .*; epochs=2: 198 .*=0.002 as that"),
        (46, {"rows_per_step": 16}, " 3 opt.*_step=1 with learning_rate=0.00025: 46 .*; .*_step=1 and epochs=3: 138"),
        (46, {"rows_per_step": 16, "epochs": 40}, None),
        (46, {"rows_per_step": 16, "max_steps": 5}, None),
        (120, {"rows_per_step": 1, "epochs": 0.5}, "takes 60 optimizer steps, .*: epochs=1: 120 optimizer steps$"),
        (4, {}, "takes 1 optimizer step, .*: rows_per_step=1 with learning_rate=0.0005: 4 optimizer steps; or"),
        (1, {"rows_per_step": 16}, "takes 1 optimizer step, .* add data$"),
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
    with pytest.raises(
        UserError, match='is "auto", at most 16, which 3 processes cannot share evenly: take 1, 2, 4, 8 or 16'
    ):
        settle_rows_per_step(replace(TRAIN, rows_per_step="auto"), 100, 3)


@pytest.mark.parametrize("value", ["Auto", "16", 4.0, True, None, 0, -1])
def test_another_value_is_refused(value):
    with pytest.raises(UserError, match="TrainSpec.rows_per_step is"):
        replace(TRAIN, rows_per_step=value)


def test_nothing_is_advised_that_the_processes_cannot_share():
    two = few_steps_warning(46, replace(TRAIN, rows_per_step=16), processes=2)
    assert "rows_per_step=2 with" in two and "rows_per_step=2 and epochs=5: 115 optimizer steps" in two
    all_of_them = few_steps_warning(160, replace(TRAIN, rows_per_step=16), processes=16)
    assert "rows_per_step" not in all_of_them and "epochs=10: 100 optimizer steps" in all_of_them
    auto = step_lines(46, replace(TRAIN, rows_per_step="auto"), 2)[-1]  # 2 rows already, the fewest for two
    assert "rows_per_step" not in auto and "epochs=5: 115 optimizer steps" in auto


@pytest.mark.parametrize("epochs", [0.1, 1, 50])
def test_a_run_that_goes_on_keeps_its_number_whatever_its_epochs_are_now(epochs):
    auto = replace(TRAIN, rows_per_step="auto", epochs=epochs)
    settled = settle_rows_per_step(auto, 100, 1, begun_with=4)
    assert (settled.rows_per_step, settled.learning_rate) == (4, TRAIN.learning_rate / 2)
    steps, kept = step_lines(100, auto, 1, begun_with=4)  # and no warning
    assert ", 4 a step)" in steps and "kept from the run's beginning" in kept
    with pytest.raises(UserError, match="rows_per_step is 4, which 16 processes cannot share"):
        settle_rows_per_step(auto, 100, 16, begun_with=4)


def test_it_says_where_max_steps_ends_the_run():
    assert step_lines(400, replace(TRAIN, max_steps=7))[0].endswith("; the run takes 7 (max_steps)")
