"""What a run over packed rows does with its data: every row once, every answer whole, the held-out loss one by one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.data.batches import collate, split_into_examples
from common.data.steps import count_steps
from common.model.activation_checkpointing import Policy
from common.run.metrics_file import read_metrics
from common.run.trainer_config import build_trainer
from common.run.training import train
from common.tokens.chat_format import ChatFormat
from common.tokens.labels import IGNORED
from tests.run.test_training import prepare, split


@pytest.mark.parametrize("micro_batch_rows", [1, 4])
def test_an_epoch_has_as_many_steps_as_packed_rows_by_rows_per_step_and_trains_each_row_once(recipe, micro_batch_rows):
    recipe = replace(recipe, train=replace(recipe.train, max_steps=None, epochs=1.0, eval_every=1000, sample_answers=0))
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, micro_batch_rows, Policy(2, 2)))
    examples = sum(len(row["seq_lengths"]) for row in rows.train)
    assert len(rows.train) < 0.7 * examples  # they are packed
    steps = -(-len(rows.train) // 4)
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0]) if torch.is_grad_enabled() else None
    )
    metrics = train(model, tokenizer, rows, recipe, plan)
    taken = [entry for entry in read_metrics(Path(recipe.out)) if "loss" in entry]
    assert count_steps(len(rows.train), recipe.train) == metrics["steps"] == steps
    assert [entry["step"] for entry in taken] == list(range(1, steps + 1))
    assert taken[-1]["tokens"] == sum(len(row["input_ids"]) for row in rows.train)
    trained = seen[2 if plan.accumulation > 1 else 1 :]  # the first ones are the rehearsal
    found = [[t for t in row if t != tokenizer.pad_token_id] for batch in trained for row in batch.tolist()]
    assert sorted(found) == sorted(row["input_ids"] for row in rows.train)


def test_the_held_out_loss_of_packed_rows_is_that_of_their_examples_one_by_one(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, 4))
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    packed = trainer.evaluate()["eval_loss"]
    nll, count = 0.0, 0
    for example in split_into_examples(collate(list(rows.evaluation), tokenizer.pad_token_id)):
        with torch.no_grad():
            logits = model.eval()(input_ids=example["input_ids"], use_cache=False).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, example["labels"][0, 1:], reduction="sum").item()
        count += (example["labels"][0, 1:] != IGNORED).sum().item()
    assert len(rows.evaluation) < 20 and count > 100
    assert packed == pytest.approx(nll / count, rel=1e-5)


def test_every_trained_answer_of_a_packed_row_ends_with_its_end_token_however_short_the_rows_are(recipe):
    """Conversations that are cut keep whole turns, and one of which no turn fits is left out."""
    whole = set()
    for seq_len in (4096, 40):
        long = replace(recipe.data, eval_rows=0, max_long_share=1.0, max_bad_share=1.0)
        short = replace(recipe, data=long, train=replace(recipe.train, seq_len=seq_len))
        _, tokenizer, rows, _, _ = prepare(short, split(recipe, 1))
        end = ChatFormat(tokenizer).end_of_turn_id()
        answers = []
        for row in rows.train:
            for example in split_into_examples(collate([row], tokenizer.pad_token_id)):
                labels = [*example["labels"][0].tolist(), IGNORED]
                answer: list[int] = []
                for label in labels:
                    if label != IGNORED:
                        answer.append(label)
                    elif answer:
                        answers.append(tuple(answer))
                        answer = []
        assert answers and all(answer[-1] == end and answer.count(end) == 1 for answer in answers)
        whole = whole or set(answers)
        assert set(answers) <= whole
    assert len(set(answers)) < len(whole)  # some did not fit
