"""The measurement that a GPU takes (make memory), rehearsed on a CPU with a small model."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.memory import (
    POLICIES,
    copies_of,
    hidden_lines,
    hidden_share,
    in_words,
    main,
    measure,
    named_policies,
    policies,
)
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.plan.forecast import Forecast, Setting
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from tests import flash_on_cpu  # noqa: F401 - gives torch the operators of packed attention
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


def test_streamed_weights_are_measured_beside_those_on_the_card(small_model):
    folder = str(small_model("llama", num_hidden_layers=4))
    recipe = Recipe(ModelSpec(folder), DataSpec("none"), LoraSpec(4, 8), TrainSpec(64, 2, 1e-3), None)
    forecast = Forecast(recipe, Setting(torch.float32, "sdpa"))
    results = []
    for on_host in (0, 4):
        layout = Layout(on_host=on_host)
        model = attach_lora(load_4bit(recipe.model, FP32, layout=layout), recipe.lora).train()
        results.append(measure(model, forecast, 64, Policy(4), FP32, repeats=1, on_host=on_host))
    on_card, streamed = results
    # Of four layers two are copied in each direction.
    assert streamed["streamed_bytes"] == 2 * (4 - 2) * forecast.step(64, Policy(4)).streamed_per_layer
    assert on_card["streamed_bytes"] == 0
    assert on_card["predicted_bytes"] > streamed["predicted_bytes"]
    assert "the weights of 4 layers in host memory" in in_words(streamed)
    assert len(hidden_lines(results, 25e9)) == 1 and "hidden_share" in streamed


def test_copies_hide_as_far_as_a_micro_batch_takes_no_longer_for_them():
    on_card = {"seconds": 2.0, "streamed_bytes": 0}
    half = {"seconds": 2.5, "streamed_bytes": 25e9}  # a second of copies
    assert hidden_share(half, on_card, 25e9) == pytest.approx(0.5)
    assert hidden_share(half | {"seconds": 1.99}, on_card, 25e9) == 1


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False):
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=time_range)


def test_copies_are_hidden_where_a_kernel_runs_beside_them():
    """By the profiler's times: a copy of 10 us of which 6 lie beside kernels that overlap, and one beside nothing."""
    events = [
        event("Memcpy HtoD (Pinned -> Device)", 10, 20),
        event("gemm", 12, 15),
        event("gemm", 14, 17),
        event("swiglu", 19, 30),
        event("Memcpy HtoD (Pinned -> Device)", 40, 50),
        event("Memcpy DtoH (Device -> Pinned)", 40, 50),  # a layer's input on its way to the host: none of the copies
        event("Memset (Device)", 41, 49),
        event("aten::copy_", 40, 50, DeviceType.CPU),
        event("ProfilerStep", 0, 100, annotation=True),
    ]
    copies = copies_of(events)
    assert copies == {"seconds": pytest.approx(20e-6), "beside_kernels": pytest.approx(6 / 20)}
    assert copies_of(events[1:4]) is None


def test_rows_in_tiles_are_measured(small_model):
    """As on a card, whose flash attention a stand-in computes here."""
    recipe = Recipe(
        ModelSpec(str(small_model("llama", num_hidden_layers=3)), bits=16),
        DataSpec("none"),
        LoraSpec(4, 8),
        TrainSpec(64, 2, 1e-3),
        None,
    )
    model = attach_lora(load_4bit(recipe.model, FP32), recipe.lora).train()
    model.set_attn_implementation("packed")
    use_lean_layers(model, recipe.train.kernels)
    forecast = Forecast(recipe, Setting(torch.float32, "packed"))
    results = [measure(model, forecast, 64, policy, FP32, repeats=1) for policy in policies(3, ("tiles", "by-head"))]
    assert [result["policy"] for result in results] == [
        str(named_policies(3)["tiles"]),
        str(named_policies(3)["by-head"]),
    ]
    assert all(result["tokens_per_s"] > 0 and result["copies"] is None for result in results)


def test_the_command_runs_on_a_cpu_with_the_small_model_alone(tmp_path, monkeypatch, capsys):
    out = tmp_path / "memory.json"
    flags = ["--models", "tiny", "--tokens", "32", "--on-host", "0", "4", "--policies", "half", "--repeats", "1"]
    flags += ["--embedding-on-host"]
    monkeypatch.setattr(sys, "argv", ["memory", *flags, "--out", str(out)])
    assert main() == 0
    assert [one["on_host"] for one in json.loads(out.read_text())["measurements"]] == [0, 4]
    said = capsys.readouterr().out
    assert ", the embedding in host memory: predicted" in said
    assert "the weights of 4 layers and the embedding in host memory: predicted" in said
    monkeypatch.setattr(sys, "argv", ["memory", "--models", "llama3-8b", "--out", str(out)])
    assert main() == 2
    assert set(policies(2)) < set(policies(2, POLICIES))
