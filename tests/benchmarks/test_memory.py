"""The measurement that a GPU takes (make memory), rehearsed on a CPU with a small model."""

import torch

from benchmarks.memory import in_words, measure, policies
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.plan.forecast import Forecast, Setting
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from tests.conftest import FP32


def test_every_policy_is_measured(small_model):
    folder = str(small_model("qwen3", num_hidden_layers=3))
    recipe = Recipe(ModelSpec(folder), DataSpec("none"), LoraSpec(4, 8), TrainSpec(64, 2, 1e-3), None)
    forecast = Forecast(recipe, Setting(torch.float32, "sdpa"))
    model = attach_lora(load_4bit(recipe.model, FP32), recipe.lora).train()
    use_lean_layers(model, recipe.train.kernels)
    results = [measure(model, forecast, 64, policy, FP32, repeats=1) for policy in policies(3)]
    assert len({result["policy"] for result in results}) == 5
    assert all(result["predicted_bytes"] > 0 and result["tokens_per_s"] > 0 for result in results)
    assert results[0]["predicted_bytes"] > results[1]["predicted_bytes"] > results[2]["predicted_bytes"]
    assert "predicted 0.06 GiB" in in_words(results[0])  # two workspaces of 32 MiB, and little beside them
