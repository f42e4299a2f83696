"""What only a GPU can show. Run with: make test ARGS="-m gpu"."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from common.activation_checkpointing import checkpoint_activations
from common.adapters import attach_lora
from common.data import load_rows
from common.loading import load_4bit, load_tokenizer
from common.machine import GIB, this_machine
from common.planner import plan_for_card
from common.recipe import DataSpec
from common.training import train
from recipes.llama3_8b import RECIPE
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here; runs on a machine with one"),
    # Where an operator has no deterministic form it warns; the test of two equal runs decides.
    pytest.mark.filterwarnings("default:.*determinis.*:UserWarning"),
]


def test_make_finetune_learns_on_a_gpu(tmp_path):
    command = [sys.executable, "-m", "recipes", "tiny", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    before, after = map(int, re.search(r"exact match: (\d+)% before, (\d+)% after", done.stdout).groups())
    assert before <= 5
    assert after >= 90


def run(out: str, layers: int | None, steps: int) -> tuple[dict, int]:
    """Llama 3 8B, or its first layers, with random weights: metrics, and the peak that was allocated in bytes."""
    recipe = replace(
        RECIPE,
        model=replace(RECIPE.model, weights="random", layers=layers),
        data=DataSpec(str(ROOT / "data" / "tiny" / "train.jsonl"), eval_rows=0),
        train=replace(RECIPE.train, max_steps=steps),
        out=out,
    )
    torch.cuda.reset_peak_memory_stats()
    plan = plan_for_card(recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len)
    model = attach_lora(load_4bit(recipe.model), recipe.lora, recipe.train.seed)
    checkpoint_activations(model, plan.checkpointing)
    return train(model, tokenizer, rows, recipe, plan), torch.cuda.max_memory_allocated()


def test_the_same_seed_gives_the_same_adapter_on_a_gpu(tmp_path):
    for name in ("a", "b"):
        run(str(tmp_path / name), layers=2, steps=2)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_llama3_8b_stays_within_its_estimate(tmp_path):
    metrics, peak = run(str(tmp_path), layers=None, steps=2)
    print(f"{this_machine()}: peak {peak / GIB:.2f} GiB allocated, {metrics['tokens_per_s']:,.0f} tokens/s")
    assert peak <= 24 * GIB
