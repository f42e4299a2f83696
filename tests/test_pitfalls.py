"""The known traps of 4-bit LoRA fine-tuning, by number: each has a test named after it, or a reason here.

test_pitfall_N in any file of this folder is the test of trap N.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.machine.device import Machine
from common.recipe import ModelSpec
from common.run.trainer_config import build_trainer
from tests.run.test_training import prepare

# Traps that cannot happen here, or not yet.
REASONS = {
    11: "a wrong pre-tokeniser in Mistral's files shows with those files only, which no test can download; a recipe "
    "may pin ModelSpec.revision",
    26: "embeddings of new tokens are lost on saving: no recipe can add a token, padding takes one that is there",
}


def test_every_trap_has_a_test_or_a_reason():
    text = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    names = re.findall(r"def test_pitfalls?_((?:\d+_(?:and_)?)+)", text)
    tested = {int(number) for name in names for number in re.findall(r"\d+", name)}
    assert tested.isdisjoint(REASONS)
    assert tested | REASONS.keys() == set(range(1, 37))


def test_pitfall_22_qwen_in_fp16_is_warned_of(small_model, monkeypatch, capsys):
    """On a GPU without bf16; what loads afterwards is not looked at."""
    from common.model import loading

    old_gpu = Machine(torch.device("cpu"), torch.float16, "the GPU has no bf16", "an old GPU")
    monkeypatch.setattr(loading, "AutoModelForCausalLM", None)
    for architecture, warned in (("qwen3", True), ("llama", False)):
        with pytest.raises(AttributeError):
            loading.load_4bit(ModelSpec(str(small_model(architecture))), old_gpu)
        assert ("models overflow in fp16" in capsys.readouterr().out) == warned


def test_pitfall_35_evaluation_keeps_no_logits(recipe, monkeypatch):
    """The held-out loss is a number a micro-batch: the head never makes logits of all of them."""
    model, tokenizer, rows, recipe, plan = prepare(replace(recipe, train=replace(recipe.train, max_steps=1)))
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    assert trainer.compute_metrics is None
    monkeypatch.setattr(torch.nn.Linear, "forward", forbid_head(model, torch.nn.Linear.forward))
    assert trainer.evaluate()["eval_loss"] > 0


def forbid_head(model, forward):
    head = model.get_output_embeddings()

    def checked(self, *arguments):
        assert self is not head, "the head was asked for its logits"
        return forward(self, *arguments)

    return checked
