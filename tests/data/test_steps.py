"""The steps that are announced are those that transformers' trainer takes."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from common.data.steps import count_steps, few_rows_warning, steps_per_epoch
from common.recipe import TrainSpec

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


def test_an_epoch_of_a_single_step_is_warned_of():
    assert few_rows_warning(5, TRAIN) is None
    assert few_rows_warning(4, TRAIN).startswith("warning: there are 4 packed rows and rows_per_step is 4")
    assert few_rows_warning(1, TRAIN).startswith("warning: there is 1 packed row and")
