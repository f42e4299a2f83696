"""What a run leaves: plain PEFT loads it, and a merge of it is the model that was trained."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.adapter.find import find_adapter
from common.adapter.load import load_trained
from common.adapter.merge_check import KL_BOUND
from common.cli import run_command
from common.data.rows import load_rows
from common.recipe import Recipe
from common.run.training import train
from tests.real_model.conftest import STEPS, real_recipe
from tests.real_model.test_base import TOLERANCE, stock_loss, stock_model
from tests.run.test_training import prepare

ASKED = ("What is the capital of France?", "Turn the hall lights off.", "你好,今天天气怎么样? 🎉")


def logits(model, tokenizer) -> torch.Tensor:
    """After each token of the conversations: fp32 (tokens, vocabulary)."""
    told = []
    for text in ASKED:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        told.append(model(input_ids=ids["input_ids"]).logits[0].float())
    return torch.cat(told)


def divergence(trained: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence from the trained model, in nats a token."""
    p, q = trained.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture
def run(request, real_model, tmp_path) -> Recipe:
    """A run that has ended, on the base in so many bits."""
    if request.param == 4:
        return request.getfixturevalue("trained")
    recipe = real_recipe(real_model, tmp_path, request.param, max_steps=5)
    train(*prepare(recipe))
    return recipe


@pytest.mark.slow  # loads the model four times, and merges it
@pytest.mark.parametrize("run", [4, 16], indirect=True)
def test_plain_peft_and_the_merged_model_are_the_trained_one(run, tmp_path, capsys):
    with torch.no_grad():
        compare(run, tmp_path, capsys)


def compare(trained: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.out)
    plain = PeftModel.from_pretrained(stock_model(Path(trained.model.name), trained.model.bits), trained.out).eval()
    rows = load_rows(trained.data, tokenizer, trained.train.seq_len)
    told = json.loads((Path(trained.out) / "run.json").read_text())["metrics"]
    assert stock_loss(plain, rows.evaluation) == pytest.approx(told["eval_loss"], abs=TOLERANCE)

    expected = logits(plain, tokenizer)
    with plain.disable_adapter():
        moved = divergence(expected, logits(plain, tokenizer))
    ours = logits(load_trained(find_adapter(trained)), tokenizer)
    print("largest difference of a logit", (ours - expected).abs().max().item(), "of", expected.abs().max().item())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    capsys.readouterr()
    assert run_command("merge", "smollm2", trained, ["--to", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    kl = divergence(expected, logits(merged, AutoTokenizer.from_pretrained(tmp_path / "merged")))
    print(printed, "KL of the merged model", kl, "and of the base", moved)
    said = float(re.search(r"KL ([\d.e+-]+) nats a token to the trained model", printed)[1])
    assert said <= KL_BOUND or "all of it is rounding" in printed
    assert kl <= 10 * max(said, KL_BOUND)  # of other prompts
    assert moved > (100 if trained.train.max_steps == STEPS else 10) * kl  # fewer steps move it less
