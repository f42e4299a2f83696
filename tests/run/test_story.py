"""The story of a recipe: what a user's copy of an earlier version says still trains, and gives the same adapter."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.cli import run_command
from common.model.lean_layers import is_lean
from common.recipe import Recipe
from tests.conftest import ROOT
from tests.machine.test_processes import CPU, launcher
from tests.run.test_training import adapter

IMPORTS = """
from common.data import load_rows
from common.model import {names}
from common.plan import plan_for_card
from common.run import generate, load_prompts, train

def main(recipe):
    plan = plan_for_card(recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len, recipe.train.seed)
"""
NEW = (
    IMPORTS.format(names="attach_lora, checkpoint_activations, load_4bit, load_tokenizer")
    + """
    model = load_4bit(recipe.model, layout=plan.layout)
    model = attach_lora(model, recipe.lora, recipe.train.seed)
    checkpoint_activations(model, plan.checkpointing)
    train(model, tokenizer, rows, recipe, plan)
"""
)
# Word by word what recipes said in earlier versions.
WITH_SHARD_LAYERS = (
    IMPORTS.format(
        names="attach_lora, checkpoint_activations, load_4bit, load_tokenizer, shard_layers, use_lean_layers"
    )
    + """
    model = load_4bit(recipe.model, layout=plan.layout)
    model = attach_lora(model, recipe.lora, recipe.train.seed)
    use_lean_layers(model, recipe.train.kernels)
    checkpoint_activations(model, plan.checkpointing)
    shard_layers(model, plan.layout)  # where the plan shards: reads each layer that load_4bit left empty, shards it
    train(model, tokenizer, rows, recipe, plan)
"""
)
WITHOUT_SHARD_LAYERS = (
    IMPORTS.format(names="attach_lora, checkpoint_activations, load_4bit, load_tokenizer, use_lean_layers")
    + """
    model = load_4bit(recipe.model)
    model = attach_lora(model, recipe.lora, recipe.train.seed)
    use_lean_layers(model, recipe.train.kernels)
    checkpoint_activations(model, plan.checkpointing)
    train(model, tokenizer, rows, recipe, plan)
"""
)
GENERATE = """
    prompts = load_prompts("data/tiny/held_out.jsonl", tokenizer, limit=3)
    print(len(generate(model, tokenizer, prompts)))
    train("""
ANSWERS_FIRST = NEW.replace("    train(", GENERATE)


def story(text: str):
    names: dict = {}
    exec(text, names)
    return names["main"]


@pytest.fixture
def recipe(recipe) -> Recipe:
    return replace(recipe, train=replace(recipe.train, max_steps=2, sample_answers=0))


@pytest.fixture
def finetune(recipe):
    """finetune(story, flags): the exit status of `make finetune`, and the adapter, by name."""

    def run(text: str, *flags: str, recipe: Recipe = recipe) -> tuple[int, dict[str, torch.Tensor]]:
        status = run_command("finetune", "x", recipe, ["--out", recipe.out, "--overwrite", *flags], story(text))
        return status, adapter(recipe.out) if status == 0 else {}

    return run


@pytest.mark.parametrize("old", [WITH_SHARD_LAYERS, WITHOUT_SHARD_LAYERS], ids=["shard_layers", "before that"])
@pytest.mark.parametrize("kernels", ["lean", "stock"])
def test_a_copied_recipe_of_an_earlier_version_gives_the_same_adapter(finetune, recipe, old, kernels):
    recipe = replace(recipe, train=replace(recipe.train, kernels=kernels))
    (status, given), (_, expected) = (finetune(text, recipe=recipe) for text in (old, NEW))
    assert status == 0
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


def test_train_makes_the_layers_lean_and_says_once_where_they_cannot_be(finetune, recipe, capsys):
    seen = []
    text = NEW + "    seen.append(model)\n"
    names: dict = {"seen": seen}
    exec(text, names)
    assert run_command("finetune", "x", recipe, ["--out", recipe.out], names["main"]) == 0
    assert is_lean(seen[0])
    dropout = replace(recipe, lora=replace(recipe.lora, dropout=0.1))
    capsys.readouterr()
    for text in (NEW, WITH_SHARD_LAYERS):
        assert finetune(text, recipe=dropout)[0] == 0
        assert capsys.readouterr().out.count("layers: stock, slower") == 1


def test_a_story_that_makes_other_layers_than_its_recipe_says_is_one_line_that_names_the_call(finetune, recipe, capfd):
    recipe = replace(recipe, train=replace(recipe.train, kernels="stock"))
    text = WITH_SHARD_LAYERS.replace("recipe.train.kernels", '"lean"')
    assert finetune(text, recipe=recipe)[0] == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error:"))
    assert "remove the call of use_lean_layers from the recipe" in line


SCRIPT = """
import sys
from dataclasses import replace
from common.cli import run
from recipes.tiny import RECIPE

values = replace(RECIPE.train, max_steps=2, sharding="always", kernels={kernels!r}, sample_answers=0)
recipe = replace(RECIPE, train=values, data=replace(RECIPE.data, eval_source=None, eval_rows=0, drift_source=None))
sys.exit(run(main, recipe))
"""


def sharded(folder: Path, name: str, text: str, kernels: str = "lean") -> tuple[str, dict[str, torch.Tensor]]:
    """What a story printed that two processes ran with sharded layers, and the adapter."""
    (folder / f"{name}.py").write_text(text + SCRIPT.format(kernels=kernels))
    command = [sys.executable, *launcher(2), str(folder / f"{name}.py"), "--out", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=CPU, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, adapter(folder / name)


@pytest.mark.slow  # 20 s a story: two processes import torch
@pytest.mark.parametrize("kernels", ["lean", "stock"])
def test_sharded_layers_are_the_same_with_the_old_story_and_with_answers_before_the_run(tmp_path, kernels):
    _, expected = sharded(tmp_path, "new", NEW, kernels)
    for name, text in (("old", WITH_SHARD_LAYERS), ("answers", ANSWERS_FIRST)):
        out, given = sharded(tmp_path, name, text, kernels)
        assert "layers sharded over 2 cards" in out
        assert all(torch.equal(given[key], tensor) for key, tensor in expected.items())
