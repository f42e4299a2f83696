from pathlib import Path

import pytest
from transformers import TrainerCallback

from common.model.activation_checkpointing import Policy, decoder_layers
from common.run.recompute_check import RecomputeCheck
from common.run.rehearsal import worst_batch
from common.run.trainer_config import build_trainer
from tests.run.test_training import EVERY, prepare, split


def test_a_layer_that_does_not_recompute_stops_the_run_in_its_first_step(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, 2, EVERY))
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))

    class Sabotage(TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            decoder_layers(model)[1].gradient_checkpointing = False

    trainer.add_callback(Sabotage())
    with pytest.raises(RuntimeError, match="activation checkpointing is not in effect: layer 1"):
        trainer.train()


def test_alone_it_counts_the_layers_of_the_first_step_again_after_a_step_down(recipe):
    model, _, rows, _, plan = prepare(recipe, split(recipe, 2, EVERY))
    batch = worst_batch(rows, 1, padding_free=False)
    check = RecomputeCheck(model.train(), lambda: EVERY)
    check.on_train_begin()
    model(**batch, num_items_in_batch=1)  # a forward pass without its backward, as one that runs out of memory
    check.count_again()
    model(**batch, num_items_in_batch=1).loss.backward()
    assert check.watch.micro_batches == 1 and set(check.watch.runs.values()) == {2}
    check.on_step_end()
    assert check.watch is None


def test_alone_another_policy_than_planned_stops_the_run(recipe):
    model, _, rows, _, plan = prepare(recipe, split(recipe, 2, EVERY))
    check = RecomputeCheck(model.train(), lambda: Policy(2, 1))
    check.on_train_begin()
    model(**worst_batch(rows, 1, padding_free=False), num_items_in_batch=1).loss.backward()
    with pytest.raises(RuntimeError, match="activation checkpointing is not in effect: layer 1 ran 2 times"):
        check.on_step_end()
