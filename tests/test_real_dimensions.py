"""Two layers of Llama 3 8B at its real dimensions, random weights, on a CPU: minutes and 10 GiB, so it is slow."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from common.data.rows import load_rows
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora, trainable_params
from common.plan.plan import Plan
from common.recipe import DataSpec
from common.run.training import train
from recipes.llama3_8b import RECIPE
from tests.conftest import FP32, ROOT


@pytest.mark.slow
def test_two_layers_of_llama3_8b_load_and_train(tmp_path):
    recipe = replace(
        RECIPE,
        model=replace(RECIPE.model, weights="random", layers=2),
        data=DataSpec(str(ROOT / "data" / "tiny" / "train.jsonl"), eval_rows=2, drift_source=None),
        train=replace(RECIPE.train, seq_len=128, rows_per_step=2, max_steps=3, warmup_ratio=0.0),
        out=str(tmp_path),
    )
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len)
    torch.set_num_threads(2)
    model = load_4bit(recipe.model, FP32)
    four_bit = [module for module in model.modules() if isinstance(module, Linear4bit)]
    # 2 layers * (2 * 4096^2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) weights
    weights = sum(module.in_features * module.out_features for module in four_bit)
    assert weights == 2 * 218_103_808
    stored = sum(
        module.weight.numel()
        + module.weight.quant_state.absmax.numel()
        + 4 * module.weight.quant_state.state2.absmax.numel()
        for module in four_bit
    )
    # NF4 + double quantisation, bits: 4 + 8/64 + 32/(64*256). arXiv:2305.14314 section 3
    assert stored == pytest.approx(weights * (4 + 8 / 64 + 32 / (64 * 256)) / 8, rel=1e-4)

    model = attach_lora(model, recipe.lora, recipe.train.seed)
    assert trainable_params(model) == 2 * 16 * 81_920  # layers * rank * (in + out over 7 projections)
    use_lean_layers(model, recipe.train.kernels)
    plan = Plan(1, 2, Layout(), Policy(2), "a test")
    checkpoint_activations(model, plan.checkpointing)
    metrics = train(model, tokenizer, rows, recipe, plan)
    assert metrics["steps"] == 3
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


@pytest.mark.slow
def test_merging_and_exporting_take_six_gib_at_most(tmp_path):
    """The embedding and the head are the largest tensors, so more layers take no more (benchmarks/results: all 32)."""
    command = [sys.executable, "-m", "benchmarks.merge_memory", "llama3-8b", str(tmp_path / "scratch"), "--layers", "2"]
    subprocess.run([*command, "--json", str(tmp_path / "peaks.json")], cwd=ROOT, check=True)
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    assert peaks["merge"]["peak_gib"] <= 6
    assert peaks["export q8_0"]["peak_gib"] <= 6
