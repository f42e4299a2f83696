"""Gemma 3 270M with real weights: beside stock transformers, and beside llama.cpp.

Its norms multiply by up to 1,657, and its embedding has 262,144 rows: small random models show neither.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.adapter.find import find_adapter
from common.adapter.load import load_trained, trained_tokenizer
from common.adapter.merge import MergedWeights, write_merged
from common.adapter.merge_check import check_merged
from common.adapter.ollama import parse_template
from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.lean_layers import is_lean, use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec, Recipe
from common.run.trainer_config import build_trainer
from common.run.training import train
from tests import real_weights
from tests.adapter.test_gguf import LlamaCpp, export, furthest
from tests.conftest import FP32
from tests.real_model.conftest import real_recipe
from tests.real_model.test_base import TOLERANCE, stock_loss, stock_model
from tests.run.test_training import prepare

TEXT = "The capital of France is Paris, and that of Italy is Rome. Two and two are four."
LAYERS = 18
pytestmark = pytest.mark.slow  # 270 million parameters on a CPU


@pytest.fixture(scope="module")
def gemma() -> Path:
    return real_weights.gemma3_weights()


def adapted(folder: Path, kernels: Any, bits: int) -> Any:
    model = attach_lora(load_4bit(ModelSpec(str(folder), bits=bits), FP32), LoraSpec(rank=4, alpha=8)).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    use_lean_layers(model, kernels)
    return model


@pytest.mark.parametrize("bits", [4, 16])
def test_the_held_out_loss_is_that_of_stock_transformers(gemma, tmp_path, bits):
    recipe = real_recipe(gemma, tmp_path, bits)
    model, tokenizer, rows, recipe, plan = prepare(recipe)
    ours = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out)).evaluate()["eval_loss"]
    assert is_lean(model)
    theirs = stock_loss(stock_model(gemma, bits), rows.evaluation)
    print(f"{bits} bits: {ours} and {theirs}")
    assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("bits", [4, 16])
def test_gradients_are_those_of_stock_layers(gemma, bits):
    """The largest difference, as a share of the largest entry of each tensor; recomputed in the lean model."""
    ids = load_tokenizer(ModelSpec(str(gemma)))(TEXT, return_tensors="pt")["input_ids"]
    found = []
    for kernels in ("stock", "lean"):
        model = adapted(gemma, kernels, bits)
        checkpoint_activations(model, Policy(LAYERS, LAYERS if kernels == "stock" else 3))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert len(found[0][1]) == LAYERS * 7 * 2
    worst = max(
        ((found[1][1][name] - grad).abs().max() / grad.abs().max()).item() for name, grad in found[0][1].items()
    )
    print(f"{bits} bits: loss {found[0][0]}, gradients differ by {worst:.1e}")
    assert worst < 1e-3


def test_it_goes_on_as_stock_transformers_does(gemma):
    tokenizer = load_tokenizer(ModelSpec(str(gemma)))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    arguments = {**prompt, "max_new_tokens": 12, "do_sample": False, "use_cache": True}
    lean = adapted(gemma, "lean", 16).eval()
    with lean.disable_adapter():
        got = lean.generate(**arguments)
    expected = stock_model(gemma, 16).generate(**arguments)
    assert torch.equal(got, expected)
    assert "the capital of the country of France" in tokenizer.decode(got[0])  # it is a base model of 270 million


@pytest.fixture(scope="module")
def trained(gemma, tmp_path_factory) -> Recipe:
    recipe = real_recipe(gemma, tmp_path_factory.mktemp("gemma"), 4, max_steps=6)
    train(*prepare(recipe))
    return recipe


def test_a_run_learns_and_its_merge_is_what_was_trained(trained, tmp_path, capsys):
    import json

    losses = [json.loads(line) for line in (Path(trained.out) / "metrics.jsonl").read_text().splitlines()]
    seen = [entry["loss"] for entry in losses if "loss" in entry]
    assert seen[-1] < seen[0] - 1  # nats
    adapter = find_adapter(trained)
    (tmp_path / "merged").mkdir()
    write_merged(MergedWeights(adapter), tmp_path / "merged")
    with capsys.disabled():
        print(check_merged(adapter, tmp_path / "merged"), seen)
    assert load_trained(adapter).generation_config.eos_token_id == [1, 106]


def test_llama_cpp_runs_its_gguf_as_transformers_does(trained, tmp_path):
    adapter = find_adapter(trained)
    tokenizer = trained_tokenizer(adapter)
    (tmp_path / "merged").mkdir()
    write_merged(MergedWeights(adapter), tmp_path / "merged")
    runtime, model = LlamaCpp(export(trained, tmp_path / "x.gguf", "bf16")), stock_model(tmp_path / "merged", 16)
    chats = [[{"role": "user", "content": text}] for text in ("Hello!", "Name a fruit:  apple,\n\n pear 🎉")]
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        told = runtime.server.handle_chat_completions({"messages": chat, "max_tokens": 1, "temperature": 0})
        assert told["usage"]["prompt_tokens"] == len(ids)
        error = furthest(runtime, model, [ids])
        print(error)
        assert error < 0.2  # nats: bf16 weights, and llama.cpp's activations in bf16 too
    assert parse_template(tokenizer).user_before == "<start_of_turn>user\n"
