"""Losses and gradients that are no numbers: the step is skipped, its rows are named, and at last the run stops."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.data.batches import collate, split_into_examples
from common.model.activation_checkpointing import Policy, decoder_layers
from common.recipe import UserError
from common.run.metrics_file import read_metrics
from common.run.skipped_steps import MAX_SKIPPED_STEPS_FP16, OptimizerStep, SkippedSteps
from common.run.training import train
from tests.run.test_training import adapter, prepare, split

ROW = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "seq_lengths": [3]}
POISON = "Xylophone"  # in no shipped conversation


def poisoned(recipe, lines: list[int], **train_values):
    """The recipe with that word in these lines (from 1) of its data, and its model, prepared."""
    path = Path(recipe.data.source)
    content = path.read_text().splitlines()
    for line in lines:
        content[line - 1] = content[line - 1].replace('"content": "', f'"content": "{POISON} ', 1)
    path.write_text("\n".join(content) + "\n")
    values = {"max_steps": 40, "rows_per_step": 4} | train_values
    recipe = replace(recipe, data=replace(recipe.data, eval_rows=0), train=replace(recipe.train, **values))
    return prepare(recipe, split(recipe, 2, Policy(2, 2)))


def spoil(model, tokenizer, how) -> None:
    """`how` changes the embeddings of rows in which the word's first token occurs."""
    word = tokenizer(POISON, add_special_tokens=False)["input_ids"]
    embedding = model.get_input_embeddings()

    def hook(_, inputs, output):
        (ids,) = inputs
        at = torch.zeros_like(ids, dtype=torch.bool)
        for i in range(ids.shape[1] - len(word) + 1):
            at[:, i] = (ids[:, i : i + len(word)] == torch.tensor(word)).all(1)
        return how(output, at)

    embedding.register_forward_hook(hook)


def test_a_row_whose_loss_is_no_number_is_named_with_its_line_and_its_step_skipped(recipe, capsys):
    model, tokenizer, rows, recipe, plan = poisoned(recipe, [17])
    spoil(model, tokenizer, lambda output, at: output.masked_fill(at[..., None], float("nan")))
    metrics = train(model, tokenizer, rows, recipe, plan)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step")]
    assert warnings
    for line in warnings:
        assert line.endswith(f": the loss is nan ({recipe.data.source}:17); the step is skipped")
    skipped = [entry["step"] for entry in read_metrics(Path(recipe.out)) if "skipped" in entry]
    assert [f"warning: step {step}:" for step in skipped] == [line[: line.index(":", 14) + 1] for line in warnings]
    assert metrics["steps"] == 40
    assert metrics["last_loss"] < metrics["first_loss"]
    assert all(tensor.isfinite().all() for tensor in adapter(recipe.out).values())


def test_a_skipped_step_leaves_the_adapter_and_its_moments_as_they_were(recipe):
    model, tokenizer, rows, recipe, plan = poisoned(recipe, range(1, 201), max_steps=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    spoil(model, tokenizer, lambda output, at: output.masked_fill(at[..., None], float("inf")))
    with pytest.raises(UserError, match="none of the 2 steps gave finite numbers; mend the rows named above"):
        train(model, tokenizer, rows, recipe, plan)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_pitfall_33_three_such_steps_in_a_row_stop_the_run_with_advice(recipe):
    model, tokenizer, rows, recipe, plan = poisoned(recipe, range(1, 201))
    spoil(model, tokenizer, lambda output, at: output.masked_fill(at[..., None], float("nan")))
    with pytest.raises(UserError) as error:
        train(model, tokenizer, rows, recipe, plan)
    message = str(error.value)
    assert message.startswith("3 steps in a row gave no finite numbers, the last one 3: the loss is nan (")
    assert f"{recipe.data.source}:" in message and " and more)" in message
    assert message.endswith("Lower TrainSpec.learning_rate; the last good checkpoint is kept")
    assert not (Path(recipe.out) / "adapter_model.safetensors").exists()


def test_a_gradient_that_is_no_number_is_found_where_the_loss_is_one(recipe, capsys):
    model, tokenizer, rows, recipe, plan = poisoned(recipe, [17])
    layer = decoder_layers(model)[0]
    batches = []
    layer.register_forward_hook(lambda *_: batches.append(1))

    def explode(_, __, output):
        if len(batches) == 9 and output.requires_grad:
            output.register_hook(lambda grad: grad * float("inf"))

    layer.register_forward_hook(explode)
    train(model, tokenizer, rows, recipe, plan)
    out = capsys.readouterr().out
    assert out.count("the step is skipped") == 1
    assert "the gradient norm is " in out
    assert all(tensor.isfinite().all() for tensor in adapter(recipe.out).values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_in_step_3_is_seen_in_step_3_everywhere_and_in_no_other_step(recipe, monkeypatch, capsys, what):
    """Progress lines, metrics.jsonl, the report and the tracker say that step 3 was skipped, and give it no loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # so that what the run sets is taken back
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)  # a line for each step
    values = {"max_steps": 5, "report_to": "tensorboard", "sample_answers": 0}
    recipe = replace(recipe, train=replace(recipe.train, **values))
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, 2, Policy(2, 2)))
    passes = []

    def spoil_one_pass(_, __, output):
        if not output.requires_grad:
            return None
        passes.append(1)
        if len(passes) != 2 + 2 * 2 + 2:  # the rehearsal's and those of two steps, then the second of the third step
            return None
        if what == "loss":
            return output * float("nan")
        output.register_hook(lambda grad: grad * float("inf"))
        return None

    model.get_base_model().model.norm.register_forward_hook(spoil_one_pass)
    train(model, tokenizer, rows, recipe, plan)
    assert len(passes) == 2 + 2 * 5
    out, folder = capsys.readouterr().out, Path(recipe.out)
    good = [1, 2, 4, 5]
    assert "warning: step 3: the " in out and out.count("the step is skipped") == 1
    assert sorted({int(line[0]) for line in out.split("step ")[1:] if line[1:].startswith("/5 | loss")}) == good
    entries = [entry for entry in read_metrics(folder) if "eval_loss" not in entry]
    assert [(entry["step"], "skipped" in entry) for entry in entries] == [(step, step == 3) for step in range(1, 6)]
    assert all(0 < entry["loss"] < 20 and entry["grad_norm"] > 0 for entry in entries if entry["step"] != 3)
    assert "loss" not in entries[2] and "grad_norm" not in entries[2]
    page = (folder / "report.html").read_text()
    assert "1 step was skipped, because the loss or its gradient was no finite number: 3." in page
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for tag, steps in (("train/loss", good), ("train/grad_norm", good), ("train/skipped", [3])):
        assert [event.step for event in events.Scalars(tag)] == steps, tag


def test_a_step_that_fp16s_scaler_skips_in_silence_is_no_step_with_a_gradient_of_zero(recipe):
    model, *_ = prepare(recipe)
    skipped = SkippedSteps(model, lambda examples: [1.0] * len(examples), lambda examples: [])
    step = OptimizerStep(7, [collate([ROW], 0)], [torch.tensor(2.0)])
    skipped.skip_unless_finite(step, torch.tensor(float("inf")), torch.amp.GradScaler("cpu"))
    assert skipped.last == 7  # by which the log says so, in the place of its numbers


def test_fp16s_scaler_may_look_for_a_scale_that_fits_without_a_warning(recipe, capsys):
    model, *_ = prepare(recipe)
    skipped = SkippedSteps(model, lambda examples: [1.0] * len(examples), lambda examples: [])
    overflow, scaler = torch.tensor(float("inf")), torch.amp.GradScaler("cpu")
    step = OptimizerStep(1, [collate([ROW], 0)], [torch.tensor(2.0)])
    for _ in range(MAX_SKIPPED_STEPS_FP16 - 1):
        skipped.skip_unless_finite(step, overflow, scaler)
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(
        UserError, match="20 steps in a row gave no finite numbers, the last one 1: the gradient norm is"
    ):
        skipped.skip_unless_finite(step, overflow, scaler)


def test_alone_it_removes_the_gradients_of_the_step_and_names_the_examples_of_the_micro_batch(recipe, capsys):
    """The loss of the second micro-batch is no number, and there that of its second example."""
    model, *_ = prepare(recipe)
    other = {"input_ids": [7, 8, 9, 4, 5], "labels": [-100, 8, 9, -100, 5], "seq_lengths": [3, 2]}
    step = OptimizerStep(6, [collate([ROW], 0), collate([other], 0)], [torch.tensor(2.0), torch.tensor(float("nan"))])
    looked_for = []

    def nll_of_each(examples):
        return [float("nan") if example["input_ids"].tolist() == [[4, 5]] else 1.0 for example in examples]

    skipped = SkippedSteps(model, nll_of_each, lambda examples: looked_for.extend(examples) or ["rows.jsonl:9"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    capsys.readouterr()
    skipped.skip_unless_finite(step, torch.tensor(float("nan")))
    assert looked_for == [[4, 5]]
    assert skipped.last == 6
    assert all(parameter.grad is None for parameter in trained)
    assert capsys.readouterr().out == "\nwarning: step 6: the loss is nan (rows.jsonl:9); the step is skipped\n"


def test_alone_a_finite_step_is_left_as_it_is_and_ends_the_row(recipe):
    model, *_ = prepare(recipe)
    skipped = SkippedSteps(model, lambda examples: [1.0] * len(examples), lambda examples: [])
    batch, norm = collate([ROW], 0), torch.tensor(1.0)
    for loss in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):  # never three in a row
        parameter = next(p for p in model.parameters() if p.requires_grad)
        parameter.grad = torch.ones_like(parameter)
        skipped.skip_unless_finite(OptimizerStep(1, [batch], [torch.tensor(loss)]), norm)
        assert (parameter.grad is None) == (loss != 1.0)


def test_the_examples_of_a_micro_batch_come_one_by_one():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "seq_lengths": [3, 2]},
        {"input_ids": [6, 7], "labels": [-100, 7], "seq_lengths": [2]},
    ]
    for padding_free in (False, True):
        examples = split_into_examples(collate(rows, 0, padding_free=padding_free))
        assert [example["input_ids"].tolist() for example in examples] == [[[1, 2, 3]], [[4, 5]], [[6, 7]]]
        assert [example["trained_positions"].tolist() for example in examples] == [[0, 1], [0], [0]]
        assert ("cu_seq_lens_q" in examples[0]) == padding_free
    assert examples[1]["cu_seq_lens_q"].tolist() == [0, 2] and examples[1]["max_length_q"] == 2
