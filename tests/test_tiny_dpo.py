"""What `make finetune MODEL=tiny-dpo` promises: another style in the answers, and the same content."""

import json
import re
from dataclasses import replace
from time import perf_counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.run.generation import generate as stock
from models.tiny_world import OPENINGS, PREFERRED_OPENING
from recipes import tiny_dpo
from recipes.tiny_dpo import RECIPE, main
from tests.conftest import ROOT
from tests.test_tiny import HELD_OUT_PAIRS, preferences


def content(answer: str) -> str:
    """The answer without its opening."""
    return re.sub(rf"^({'|'.join(map(re.escape, OPENINGS))}) ", "", answer)


def in_style(answers: list[str]) -> list[bool]:
    return [answer.startswith(PREFERRED_OPENING) for answer in answers]


@pytest.mark.slow  # a minute: all of the recipe
def test_answers_change_their_style_and_keep_their_content(tmp_path, monkeypatch):
    answers: list[list[str]] = []

    def generate(*arguments: object) -> list[str]:
        answers.append(stock(*arguments))
        return answers[-1]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tiny_dpo, "generate", generate)  # the same, seen
    started = perf_counter()
    main(replace(RECIPE, out=str(tmp_path / "run")))
    assert perf_counter() - started <= 120
    before, after = answers
    pairs = preferences(HELD_OUT_PAIRS)
    changed = [now and not then for then, now in zip(in_style(before), in_style(after), strict=True)]
    assert sum(changed) >= 0.9 * len(pairs)
    right = [content(answer) == content(pair["chosen"]) for answer, pair in zip(after, pairs, strict=True)]
    assert sum(right) >= 0.95 * len(pairs)
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [entry["eval_rewards/accuracies"] for entry in entries if "eval_rewards/accuracies" in entry]
    assert abs(held_out[0] - 0.5) <= 0.1  # ties, up to rounding: the model is its own reference
    assert held_out[-1] >= 0.95


def test_the_base_model_prefers_neither_answer():
    """By its own likelihoods, whatever the reference: half of the held-out pairs, within two standard deviations."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / RECIPE.model.name)
    model = AutoModelForCausalLM.from_pretrained(ROOT / RECIPE.model.name, dtype=torch.float32)
    likelier = 0
    for pair in preferences(HELD_OUT_PAIRS):
        nll = []
        for name in ("chosen", "rejected"):
            chat = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[name]}]
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt")["input_ids"]
            with torch.no_grad():  # the prompt is the same in both, and so is its part of the sum
                nll.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        likelier += nll[0] < nll[1]
    assert 40 <= likelier <= 60
