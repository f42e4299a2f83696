"""Answers on a slow device: announced, told of token by token, and shorter or fewer where time is short."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from common.adapter.find import find_adapter
from common.adapter.load import load_trained
from common.cli import run_command
from common.machine import slow_work
from common.model.loading import load_4bit
from common.recipe import ModelSpec
from common.run import ending
from common.run.evaluation import compare_completions, print_before_after
from common.run.generation import Completion, cut_of, generate
from common.run.prompts import load_prompts
from common.run.report import write_report
from common.run.training import train
from tests.conftest import FP32, TINY
from tests.run.test_training import prepare

HELD_OUT = "data/tiny/held_out.jsonl"


@contextmanager
def slow_device(seconds: float, of: type[nn.Module] = LlamaForCausalLM) -> Iterator[None]:
    """Each call of such a module takes so many seconds more, whoever makes it."""

    def wait(module: nn.Module, *_: object) -> None:
        if isinstance(module, of) and not module.training:
            time.sleep(seconds)

    hook = nn.modules.module.register_module_forward_pre_hook(wait)
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def model():
    return load_4bit(ModelSpec(str(TINY)), FP32)


@pytest.fixture
def impatient(monkeypatch):
    """Status lines as a terminal of a minute's work shows them, within a second."""
    monkeypatch.setattr(slow_work, "FIRST_LINE_SECONDS", 0.05)
    monkeypatch.setattr(slow_work, "LINE_SECONDS", 0.05)


def test_a_line_says_what_is_made_before_it_begins(model, tokenizer, capsys):
    prompts = load_prompts(HELD_OUT, tokenizer, limit=2)
    generate(model, tokenizer, prompts, max_new_tokens=4)
    assert capsys.readouterr().out == "making 2 answers: at most 4 tokens each\n"
    generate(model, tokenizer, prompts, max_new_tokens=4, max_seconds=60, what="sample answers")
    assert capsys.readouterr().out == "making 2 sample answers: at most 4 tokens each, 60 s together\n"
    assert generate(model, tokenizer, []) == [] and capsys.readouterr().out == ""


def test_progress_is_told_within_a_batch_with_the_time_that_is_left(model, tokenizer, capsys, impatient):
    prompts = load_prompts(HELD_OUT, tokenizer, limit=4)
    with slow_device(0.06):
        generate(model, tokenizer, prompts, max_new_tokens=8, at_a_time=2)
    _, *lines = capsys.readouterr().out.splitlines()
    steps = [
        re.search(r"(\d) of 4 done, the next 2 at token (\d) of at most 8, at most about 0:0\d left", x) for x in lines
    ]
    told = [(int(found[1]), int(found[2])) for found in steps if found]
    assert told == sorted(told) and len(set(told)) >= 6
    assert {start for start, _ in told} == {0, 2}


def test_without_a_time_limit_a_slow_device_gives_the_same_answers(model, tokenizer):
    prompts = load_prompts(HELD_OUT, tokenizer, limit=2)
    at_once = generate(model, tokenizer, prompts, max_new_tokens=8)
    with slow_device(0.05):
        assert generate(model, tokenizer, prompts, max_new_tokens=8) == at_once


def test_time_cuts_the_answers_under_way_and_leaves_out_the_later_ones(model, tokenizer):
    prompts = load_prompts(HELD_OUT, tokenizer, limit=4)
    whole = generate(model, tokenizer, prompts, max_new_tokens=24)
    started = time.perf_counter()
    with slow_device(0.1):
        answers = generate(model, tokenizer, prompts, max_new_tokens=24, at_a_time=2, max_seconds=0.5)
    assert time.perf_counter() - started < 2
    assert len(answers) == 2
    for answer, text in zip(answers, whole, strict=False):
        assert text.startswith(answer.rstrip("\ufffd")) and answer != text
        assert (answer.cut, answer.in_time) == ("after 0.5 s", False)


def test_time_ends_within_a_prompt_that_takes_longer_than_all_of_it(model, tokenizer):
    """The model has four layers: the second one is not begun."""
    prompts = load_prompts(HELD_OUT, tokenizer, limit=2)
    started = time.perf_counter()
    with slow_device(0.5, of=LlamaDecoderLayer):
        assert generate(model, tokenizer, prompts, max_seconds=0.3) == []
    assert time.perf_counter() - started < 1.2
    assert not model.training and not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_an_answer_that_has_no_end_within_its_tokens_says_so(model, tokenizer):
    prompts = load_prompts(HELD_OUT, tokenizer, limit=2)
    short = generate(model, tokenizer, prompts, max_new_tokens=3)
    assert [(cut_of(answer), answer.in_time) for answer in short] == [("after 3 tokens", True)] * 2
    assert [cut_of(answer) for answer in generate(model, tokenizer, prompts)] == ["", ""]


def test_exact_match_is_of_whole_answers_alone(model, tokenizer, capsys):
    prompts = load_prompts(HELD_OUT, tokenizer, limit=3)
    right = [Completion(prompt.reference) for prompt in prompts]
    slow = [*right[:2], Completion("{", "after 60 s", in_time=False)]
    for before, after in ((slow, right), (right, slow), (right, right[:2])):
        print_before_after(prompts, before, after)
        out = capsys.readouterr().out
        assert (
            "exact match: not measured, because time allowed whole answers to 2 of 3 prompts" in out and "%" not in out
        )
    print_before_after(prompts, slow, right)
    assert "before  { … (cut after 60 s)" in capsys.readouterr().out
    endless = [*right[:2], Completion("{", "after 96 tokens")]
    print_before_after(prompts, endless, right)
    out = capsys.readouterr().out
    assert "exact match: 67% before, 100% after (3 prompts)" in out
    assert "counted as wrong, because they had no end within their tokens: 1 before, 0 after" in out


def test_a_run_on_a_slow_device_shows_shorter_sample_answers_and_marks_them(recipe, monkeypatch, capsys):
    monkeypatch.setattr(ending, "SAMPLE_SECONDS", 0.5)
    recipe = replace(recipe, train=replace(recipe.train, max_steps=1))
    parts = prepare(recipe)
    with slow_device(0.12):
        train(*parts)
    out = capsys.readouterr().out
    sides = [out.index(f"making 4 sample answers {which} the adapter: at most 128") for which in ("without", "with")]
    assert sides == sorted(sides) and sides[-1] < out.index("the run on a page")
    samples = json.loads((Path(recipe.out) / "run.json").read_text())["samples"]
    assert len(samples) == 4
    assert (
        {sample["before_cut"] for sample in samples} == {sample["after_cut"] for sample in samples} == {"after 0.5 s"}
    )
    assert (Path(recipe.out) / "report.html").read_text().count("… (cut after 0.5 s)") == 8


def test_samples_that_no_time_is_left_for_are_counted(adapted, tokenizer, capsys):
    model = load_trained(find_adapter(adapted("llama")), tokenizer)
    prompts = load_prompts(HELD_OUT, tokenizer, limit=12)
    with slow_device(0.1):
        samples = compare_completions(model, tokenizer, prompts, max_seconds=0.4)
    assert len(samples) == 8  # one batch
    assert "8 of 12 sample answers: 0.4 s were too short for the others" in capsys.readouterr().out


def test_make_eval_takes_the_time_that_it_is_given(recipe, capsys):
    train(*prepare(replace(recipe, train=replace(recipe.train, max_steps=1, sample_answers=0))))
    with slow_device(0.12):
        assert run_command("eval", "x", recipe, ["--answer-seconds", "1", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "making 2 sample answers with the adapter: at most 128 tokens each, 1 s together" in out
    assert "(cut after 1 s)" in re.sub(r"[│\s]+", " ", out)
    told = json.loads((Path(recipe.out) / "eval.json").read_text())["samples"]
    assert [sample["after_cut"] for sample in told] == ["after 1 s"] * 2


def test_a_run_of_before_has_a_report_still(finetuned, tmp_path):
    """Its samples do not say whether they were cut."""
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((finetuned[1] / name).read_bytes())
    run = json.loads((tmp_path / "run.json").read_text())
    run["samples"] = [{"asked": "1+1?", "wanted": "2", "before": "?", "after": "2"}]
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert "(cut" not in write_report(tmp_path).read_text()


def test_only_the_main_process_says_what_is_made(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert len(generate(model, tokenizer, load_prompts(HELD_OUT, tokenizer, limit=1), max_new_tokens=2)) == 1
    assert capsys.readouterr().out == ""
    assert torch.is_grad_enabled()
