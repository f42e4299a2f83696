"""Whole runs whose frozen weights stream from host memory end like those with all weights on the device, to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.data.rows import load_rows
from common.model.activation_checkpointing import checkpoint_activations
from common.model.host_embedding import HostEmbedding, has_host_embedding
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.model.weight_streaming import weight_ring
from common.plan.machine_plan import plan_for_card
from common.recipe import LoraSpec, ModelSpec, Recipe
from common.run.generation import generate
from common.run.metrics_file import read_metrics
from common.run.prompts import load_prompts
from common.run.training import train
from tests.conftest import ARCHITECTURES, TRAIN
from tests.run.test_training import adapter

LAYERS = 5
DROPOUT = LoraSpec(rank=4, alpha=8, dropout=0.1)


def run(recipe: Recipe) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    """The story of a recipe: its losses, the adapter that it leaves, and answers before it."""
    plan = plan_for_card(recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len, recipe.train.seed)
    model = attach_lora(load_4bit(recipe.model, layout=plan.layout), recipe.lora, recipe.train.seed)
    checkpoint_activations(model, plan.checkpointing)
    assert has_host_embedding(model) == plan.layout.embedding_on_host
    ring = weight_ring(model)
    assert (len(ring.blocks) if ring else 0) == plan.layout.streamed
    answers = generate(model, tokenizer, load_prompts(TRAIN, tokenizer)[:2], max_new_tokens=4)
    train(model, tokenizer, rows, recipe, plan)
    losses = [
        entry[name] for entry in read_metrics(Path(recipe.out)) for name in ("loss", "eval_loss") if name in entry
    ]
    return losses, adapter(recipe.out), answers


def streamed(recipe: Recipe, on_host: int, **train) -> Recipe:
    out = f"{recipe.out}-{on_host}"
    return replace(recipe, out=out, train=replace(recipe.train, weights_on_host=on_host, **train))


def assert_same_run(found, expected) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())
    assert found[2] == expected[2]


@pytest.fixture
def five_layers(small_model, recipe):
    def make(architecture: str = "llama", **values) -> Recipe:
        folder = small_model(architecture, num_hidden_layers=LAYERS)
        values.setdefault("lora", recipe.lora)
        train = {"max_steps": 20, "eval_every": 10, "checkpointing": "every layer", "sample_answers": 1}
        train = replace(recipe.train, **train, kernels=values.pop("kernels", "lean"))
        return replace(recipe, model=ModelSpec(str(folder)), train=train, **values)

    return make


@pytest.mark.slow  # 20 runs of 20 steps
@pytest.mark.parametrize("kernels", ["lean", "stock"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_twenty_steps_are_the_same_bits(five_layers, architecture, kernels):
    recipe = five_layers(architecture, kernels=kernels, lora=replace(DROPOUT, dropout=0.1 * (kernels == "stock")))
    assert_same_run(run(streamed(recipe, LAYERS)), run(streamed(recipe, 0)))


@pytest.mark.parametrize("on_host", [pytest.param(0, marks=pytest.mark.slow), 3])  # the same with less, 8 s
def test_a_run_with_its_embedding_on_the_host_is_the_same_bits_and_asks_no_gpu_for_token_ids(
    five_layers, on_host, monkeypatch
):
    recipe = five_layers("qwen2")
    recipe = replace(recipe, train=replace(recipe.train, max_steps=4, eval_every=2))
    expected = run(streamed(recipe, on_host))
    known, forward = [], HostEmbedding.forward

    def watched(embedding, ids):
        if torch.is_grad_enabled():  # in training
            known.append(embedding.host_ids is not None)
        return forward(embedding, ids)

    monkeypatch.setattr(HostEmbedding, "forward", watched)
    moved = streamed(replace(recipe, out=f"{recipe.out}-moved"), on_host, embedding_on_host=True)
    assert_same_run(run(moved), expected)
    rehearsed = known.index(True)
    assert all(known[rehearsed:]) and len(known) > 4
    layout = json.loads((Path(moved.out) / "run.json").read_text())["plan"]["layout"]
    assert layout["embedding_on_host"] is True and layout["on_host"] == on_host
    # and goes on with the embedding on the device
    run(replace(streamed(replace(recipe, out=f"{recipe.out}-moved"), on_host, max_steps=6), existing_run="resume"))


def test_a_run_with_dropout_is_the_same_bits(five_layers):
    recipe = five_layers("qwen3", lora=DROPOUT)
    recipe = replace(recipe, train=replace(recipe.train, max_steps=4, eval_every=2))
    assert_same_run(run(streamed(recipe, 3)), run(streamed(recipe, 0)))


def test_a_run_goes_on_with_other_weights_on_the_host(five_layers):
    """With a constant learning rate two steps are the first half of four."""
    recipe = five_layers()
    recipe = replace(recipe, train=replace(recipe.train, save_every=2, lr_schedule="constant", warmup_ratio=0.0))
    expected = run(streamed(recipe, 0, max_steps=4))
    first = streamed(recipe, 4, max_steps=2)
    run(first)
    for on_host in (0, 5):
        again = replace(first, existing_run="resume")
        found = run(
            replace(again, train=replace(first.train, max_steps=2 + 2 * (on_host == 5), weights_on_host=on_host))
        )
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


@pytest.mark.slow  # four runs of two steps
def test_a_run_in_16_bits_with_a_tied_head_that_starts_from_another_one_is_the_same_bits(small_model, five_layers):
    folder = small_model("qwen3", num_hidden_layers=LAYERS, tie_word_embeddings=True)
    recipe = replace(five_layers(), model=ModelSpec(str(folder), bits=16))
    found = []
    for on_host in (0, 4):
        first = streamed(recipe, on_host, max_steps=2)
        run(first)
        again = replace(first, out=f"{first.out}-again", lora=replace(recipe.lora, start_from=first.out))
        found.append(run(again))
    assert_same_run(found[1], found[0])
