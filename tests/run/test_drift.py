"""Drift: how far an adapter has moved the model on general texts."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer

from common.cli import run_command
from common.recipe import UserError
from common.run import general_texts
from common.run.drift import DRIFT_ADVICE, LARGE_RISE, Drift, measure_drift
from common.run.general_texts import load_general_texts
from common.run.report import write_report
from common.run.resume import refuse_another_run, run_identity
from common.run.training import train
from tests.run.test_training import prepare

TEXTS = [
    {"messages": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the table."}]},
    {"text": "Ana lives in Oslo and works as a baker."},
    {"messages": [{"role": "user", "content": "Six times seven?"}, {"role": "assistant", "content": "42"}]},
]


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in TEXTS))
    return str(path)


@pytest.fixture
def measured(recipe, own, monkeypatch):
    """A model with an adapter of noise, the texts in rows of unlike lengths, and the tokenizer."""
    monkeypatch.setattr(general_texts, "DRIFT_ROW_TOKENS", 16)
    model, tokenizer, *_ = prepare(recipe)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, load_general_texts(own, tokenizer, 128), tokenizer


def in_float64(model, texts) -> dict[str, float]:
    """The same from the logits of each text by itself, which sees no other one."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for row in texts.rows:
        starts = [0, *torch.tensor(row["seq_lengths"]).cumsum(0).tolist()]
        for start, end in zip(starts, starts[1:], strict=False):
            ids = torch.tensor([row["input_ids"][start:end]])
            labels = torch.tensor(row["labels"][start + 1 : end])
            with torch.no_grad():
                with model.disable_adapter():
                    base = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
                ours = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            base, ours, labels = base[labels != -100], ours[labels != -100], labels[labels != -100]
            sums[0] += (base.exp() * (base - ours)).sum()
            sums[1] -= base.gather(-1, labels[:, None]).sum()
            sums[2] -= ours.gather(-1, labels[:, None]).sum()
            count += len(labels)
    return dict(zip(("kl", "base_loss", "loss"), (sums / count).tolist(), strict=True)) | {"tokens": count}


@pytest.mark.parametrize("micro_batch_rows", [1, 3])
def test_it_is_what_the_logits_of_each_text_give_in_float64(measured, micro_batch_rows):
    model, texts, tokenizer = measured
    model.eval()
    assert len(texts.rows) > 1
    found, wanted = measure_drift(model, texts, tokenizer, micro_batch_rows), in_float64(model, texts)
    assert found.kl > 1e-3
    assert {name: asdict(found)[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert (found.texts, found.left_out, found.source) == (3, 0, texts.source)


def test_no_text_sees_another_one_in_its_row(measured, own):
    """Packed into one row they give what they give in rows of their own."""
    model, texts, tokenizer = measured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general_texts, "DRIFT_ROW_TOKENS", 128)
        together = load_general_texts(own, tokenizer, 128)
    assert len(together.rows) == 1 < len(texts.rows)
    alone = asdict(measure_drift(model, texts, tokenizer))
    assert asdict(measure_drift(model, together, tokenizer)) == {
        name: value if name == "source" else pytest.approx(value, rel=1e-5) for name, value in alone.items()
    }


def test_an_adapter_that_has_learnt_nothing_has_none(recipe, own):
    model, tokenizer, *_ = prepare(recipe)
    found = measure_drift(model, load_general_texts(own, tokenizer, 128), tokenizer)
    assert found.kl == 0 and found.loss == found.base_loss and found.advice() is None


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(measured, training):
    """Mode, adapter, what is trained, and the random numbers that training goes on with."""
    model, texts, tokenizer = measured
    model.train(training)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    drawn = torch.get_rng_state()
    measure_drift(model, texts, tokenizer)
    assert model.training is training and torch.equal(torch.get_rng_state(), drawn)
    assert not any(part.disable_adapters for part in model.modules() if isinstance(part, LoraLayer))
    assert not model.get_base_model().base_model._forward_hooks
    for name, parameter in model.named_parameters():
        assert (parameter.requires_grad, parameter.grad) == (before[name][0], None)
        assert torch.equal(parameter, before[name][1])


def test_dropout_is_off(recipe, own):
    model, tokenizer, *_ = prepare(replace(recipe, lora=replace(recipe.lora, dropout=0.5)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    texts = load_general_texts(own, tokenizer, 128)
    assert measure_drift(model.train(), texts, tokenizer) == measure_drift(model, texts, tokenizer)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_out_of_memory_is_a_line_and_the_model_stays_as_it_was(measured, monkeypatch, capsys, kind):
    model, texts, tokenizer = measured
    head = model.get_base_model().base_model
    hook = head.register_forward_hook(lambda *_: (_ for _ in ()).throw(kind("CUDA error: out of memory")))
    assert measure_drift(model.train(), texts, tokenizer) is None
    hook.remove()
    assert "off the task: not measured, it did not fit the card beside the optimizer" in capsys.readouterr().out
    assert model.training and measure_drift(model, texts, tokenizer) is not None


def test_a_model_without_finite_numbers_is_a_line(measured, capsys):
    model, texts, tokenizer = measured
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(math.nan)
    assert measure_drift(model, texts, tokenizer) is None
    assert "gives no finite numbers" in capsys.readouterr().out


def test_a_run_says_it_and_keeps_it_with_make_eval_and_the_page(recipe, own, capsys):
    """make eval loads the adapter anew and finds the same."""
    recipe = replace(recipe, data=replace(recipe.data, drift_source=own))
    train(*prepare(recipe))
    folder = Path(recipe.out)
    told = json.loads((folder / "run.json").read_text())["drift"]
    assert told["texts"] == 3 and told["kl"] > 0
    out = capsys.readouterr().out
    assert (
        f"off the task: 3 texts of {own}, loss {told['base_loss']:.2f} before and {told['loss']:.2f} after, KL" in out
    )
    assert out.count("own.jsonl") == 1  # no report of rows, as of data to train on
    assert f"{told['base_loss']:.4f}" in (folder / "report.html").read_text()
    assert run_command("eval", "x", recipe, ["--samples", "0"]) == 0
    assert "off the task: 3 texts" in capsys.readouterr().out
    evaluated = json.loads((folder / "eval.json").read_text())["drift"]
    assert evaluated == {
        name: value if name == "source" else pytest.approx(value, rel=1e-3) for name, value in told.items()
    }


def test_none_measures_nothing(recipe, capsys):
    train(*prepare(recipe))
    assert json.loads((Path(recipe.out) / "run.json").read_text())["drift"] is None
    assert "off the task" not in capsys.readouterr().out
    assert "Off the task" not in (Path(recipe.out) / "report.html").read_text()


def test_texts_that_are_missing_end_a_run_before_its_first_step(recipe):
    recipe = replace(recipe, data=replace(recipe.data, drift_source="nowhere.jsonl"))
    with pytest.raises(UserError, match="nowhere.jsonl"):
        train(*prepare(recipe))
    assert not (Path(recipe.out) / "metrics.jsonl").exists()


def test_a_run_goes_on_with_other_texts(recipe, own, capsys):
    """The adapter does not depend on them."""
    _, _, rows, _, plan = prepare(recipe)
    before, now = (
        run_identity(replace(recipe, data=replace(recipe.data, drift_source=source)), rows, plan)
        for source in (None, own)
    )
    refuse_another_run(before, now, "a checkpoint")
    assert "warning" not in capsys.readouterr().out


def drift(base_loss: float, loss: float) -> Drift:
    return Drift("texts.jsonl", 104, 2, 5000, base_loss, loss, 0.0912)


def test_advice_follows_where_the_loss_has_risen_by_much():
    assert drift(2.31, 2.31 + 0.9 * LARGE_RISE).lines() == [
        "off the task: 104 texts of texts.jsonl, loss 2.31 before and 2.40 after, KL 0.091 nats a token"
    ]
    assert drift(2.31, 2.11).advice() is None
    _, line = drift(2.31, 2.51).lines()
    assert line == f"  that is much (+0.20): {DRIFT_ADVICE}"


def test_the_page_shows_it_with_advice(finetuned, tmp_path):
    run = json.loads((finetuned[1] / "run.json").read_text())
    (tmp_path / "metrics.jsonl").write_bytes((finetuned[1] / "metrics.jsonl").read_bytes())
    (tmp_path / "run.json").write_text(json.dumps(run | {"drift": asdict(drift(2.31, 2.51))}))
    page = write_report(tmp_path).read_text()
    for part in (
        "2.3100",
        "2.5100",
        "0.0912",
        "104 texts of texts.jsonl",
        "refuses 2 more",
        "That is much (+0.20): half of TrainSpec.",
    ):
        assert part in page
    del run["drift"]  # of an earlier version
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert "Off the task" not in write_report(tmp_path).read_text()


def test_the_small_model_is_measured_on_what_it_could_do(finetuned):
    """It knows its own small world alone; the general texts of large models would say nothing of it."""
    told = json.loads((finetuned[1] / "run.json").read_text())["drift"]
    assert told["source"] == "data/tiny/general.jsonl" and told["texts"] == 100 and told["left_out"] == 0
    assert told["base_loss"] < 1 and told["kl"] > 0
    assert "off the task: 100 texts" in finetuned[0]
