"""The plan of a run on this machine, which here is a CPU."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.cli import run_command
from common.kernels import say_references_run
from common.kernels.triton_check import why_no_triton
from common.machine import device
from common.machine.device import GIB, this_machine
from common.model.activation_checkpointing import Policy
from common.plan import card, machine_plan, plan
from common.plan.card import WORKSPACE_BYTES
from common.plan.forecast import Forecast, Setting
from common.plan.machine_plan import plan_for_card, plan_for_examples
from common.plan.planner import Planner
from common.plan.speed import speed_of
from common.recipe import ModelSpec, TrainSpec, UserError
from tests.plan.planners import MISTRAL, RECIPE, edited, plan_for

TINY = replace(RECIPE, model=ModelSpec("models/tiny"), card_gib=None, train=TrainSpec(256, 16, 1e-3))


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(UserError, match="seq_len is 16,384; .* has 8,192 positions"):
        plan_for(edited(seq_len=16384), 80)
    with pytest.raises(UserError, match="seq_len is 4,096; models/tiny has"):
        plan_for_card(replace(TINY, train=replace(TINY.train, seq_len=4096)))


def test_a_row_whose_mask_torch_finds_no_longer_is_refused_and_not_planned(tmp_path):
    """46,340 tokens have a mask of just less than 2^31 entries. Flash attention has none."""
    config = json.loads(Path("models/tiny/config.json").read_text()) | {"max_position_embeddings": 1 << 20}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = replace(RECIPE, model=ModelSpec(str(tmp_path)))

    def planner(seq_len: int, setting: Setting) -> Planner:
        train = replace(recipe.train, seq_len=seq_len)
        return Planner(replace(recipe, train=train), card.Card.of_size(80), setting)

    with_mask = Setting(torch.float16, "sdpa")
    with pytest.raises(UserError, match="seq_len is 46,341. This GPU has no flash attention, .* beyond 46,340 tokens"):
        planner(46_341, with_mask)
    planner(46_341, Setting())
    assert planner(128, with_mask).longest_row(Policy(4)) == 46_340 // 256 * 256


def test_on_a_cpu_the_tokens_of_a_micro_batch_are_limited(capsys):
    chosen = plan_for_card(TINY)
    assert (chosen.micro_batch_rows, chosen.accumulation) == (1024 // 256, 4)
    assert chosen.checkpointing == Policy(4, 4)
    assert plan_for_card(replace(TINY, train=replace(TINY.train, checkpointing="offload"))).checkpointing.offload


def test_a_small_recipe_that_falls_back_to_the_cpu_says_why(monkeypatch, capsys):
    monkeypatch.setattr(device, "unusable_gpu", lambda: "the driver is too old")
    plan_for_card(TINY)
    out = capsys.readouterr().out
    assert "warning: training on the CPU: the driver is too old" in out
    assert f"machine: {this_machine()}" in out
    assert this_machine().reason in str(this_machine())


def test_a_recipe_for_a_gpu_needs_one():
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        plan_for_card(importlib.import_module("recipes.llama3_8b").RECIPE)


@pytest.fixture
def gpu(monkeypatch):
    """What torch says of a GPU with 24 GiB, all of it free."""
    properties = SimpleNamespace(total_memory=24 * GIB, major=8, minor=9)
    answers = {
        "is_available": lambda: True,
        "get_device_properties": lambda _: properties,
        "get_device_name": lambda _: "NVIDIA GeForce RTX 4090",
        "is_bf16_supported": lambda **_: True,
        "get_device_capability": lambda _: (8, 9),
        "get_arch_list": lambda: ["sm_86"],
        "mem_get_info": lambda _: (24 * GIB, 24 * GIB),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    for asked in (this_machine, why_no_triton, say_references_run):
        asked.cache_clear()
    yield
    for asked in (this_machine, why_no_triton, say_references_run):
        asked.cache_clear()


def test_where_triton_cannot_compile_the_plan_is_made_for_the_references_that_run(gpu, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as missing:
        missing.setenv("PATH", str(tmp_path))
        missing.delenv("CC", raising=False)
        missing.setenv("TRITON_CACHE_DIR", str(tmp_path))
        missing.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
        plan = plan_for_card(TINY)
    said = "layers: in plain PyTorch operators, slower and with more memory, because Triton "
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(said) for line in lines[:3]] == [False, True, False]
    assert lines[1].endswith("apt install gcc") or "not installed" in lines[1]
    tokens, accumulates = plan.micro_batch_rows * TINY.train.seq_len, plan.accumulation > 1
    kernels, references = (
        Forecast(TINY, Setting(triton=triton)).step(tokens, plan.checkpointing, accumulates=accumulates).peak()
        for triton in (True, False)
    )
    assert plan.peak_bytes == references + WORKSPACE_BYTES > kernels + WORKSPACE_BYTES


@pytest.fixture
def planned(monkeypatch):
    """What `make plan` would count, which takes seconds: cards, settings and processes."""
    asked = []

    def stop_before_counting(_, card, setting, processes):
        asked.append((card, setting, processes))
        raise UserError("a plan takes seconds")

    monkeypatch.setattr(plan, "choose_option", stop_before_counting)
    return asked


def test_a_plan_for_a_kind_of_gpu_counts_its_memory_its_number_format_and_its_attention(planned, capsys):
    """A T4 has neither bf16 nor flash attention, and this machine has no GPU at all."""
    for flags in (["--gpu", "t4"], ["--gpu", "T4", "--card-gib", "6", "--gpus", "2"], ["--gpu", "l4"]):
        assert run_command("plan", "tiny", TINY, flags) == 2
    (t4, on_t4, _), (small, on_small, processes), (l4, on_l4, _) = planned
    assert (t4.size, small.size, l4.size) == (14.5 * GIB, 6 * GIB, 22 * GIB)
    assert on_t4 == on_small == Setting(torch.float16, "sdpa") and on_l4 == Setting()
    assert (speed_of(t4.gpu).name, speed_of(l4.gpu).name, processes) == ("T4", "L4", 2)
    assert "computing in float16 (the GPU has no bf16), attention with a mask" in capsys.readouterr().out


def test_a_plan_for_a_model_that_flash_attention_does_not_take_counts_its_mask(small_model, planned):
    odd = replace(TINY, model=ModelSpec(str(small_model(hidden_size=80, num_attention_heads=4, head_dim=20))))
    for flags in (["--gpu", "l4"], ["--card-gib", "24"]):
        assert run_command("plan", "tiny", odd, flags) == 2
    assert [setting.attention for _, setting, _ in planned] == ["sdpa", "sdpa"]


def test_a_plan_for_two_gpus_is_made_for_the_smaller_one_and_half_of_the_host_memory(monkeypatch, planned):
    free, properties = (8 * GIB, 6 * GIB), SimpleNamespace(total_memory=8 * GIB, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Faked GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 8 * GIB))
    monkeypatch.setattr(card, "available_ram", lambda: 100 * GIB)
    this_machine.cache_clear()
    try:
        assert run_command("plan", "tiny", TINY, ["--gpus", "2"]) == 2
    finally:
        this_machine.cache_clear()
    smallest = planned[0][0]
    assert smallest.name == "6.0 GiB free on Faked GPU 1, 8.0 GiB, the smallest of 2 cards"
    assert smallest.host_bytes == card.HOST_SHARE * 100 * GIB / 2


@pytest.mark.slow  # two searches
def test_a_row_of_the_data_with_more_examples_than_planned_is_planned_again(gpu, capsys):
    """Mistral 7B on 12 GiB keeps all layers for rows of 32 examples: of 400, attention's scratch takes 0.8 GiB more."""
    recipe = replace(RECIPE, model=ModelSpec(MISTRAL), train=replace(RECIPE.train, weights_on_host=0))
    planned = plan_for(recipe, 12)
    assert planned.examples_per_row == 32
    assert plan_for_examples(recipe, planned, 32) is planned
    capsys.readouterr()
    again = plan_for_examples(recipe, planned, 400)
    assert again.examples_per_row == 400 and again.card == planned.card and again.layout == planned.layout
    assert again.checkpointing.recomputed > planned.checkpointing.recomputed
    assert again.rows_per_step == planned.rows_per_step
    budget = again.card.budget + WORKSPACE_BYTES
    assert again.peak_bytes <= budget
    known = Forecast(recipe, Setting(examples_per_row=400))
    assert known.step(2048, planned.checkpointing).peak() + WORKSPACE_BYTES > budget
    out = capsys.readouterr().out
    assert "planned again: a row of the data has 400 examples, more than 32" in out
    assert "counted for rows of up to 400 examples, as the data have" in out
    fixed = replace(recipe, train=replace(recipe.train, checkpointing="none"))
    with pytest.raises(UserError, match="a row of the data has 400 examples, and 32 were planned: .* Lower TrainSpec"):
        plan_for_examples(fixed, planned, 400)


def test_a_plan_whose_memory_the_examples_do_not_change_stays():
    assert plan_for_examples(TINY, chosen := plan_for_card(TINY), 10_000) is chosen


def test_a_row_whose_mask_would_not_fit_the_ram_is_refused_on_a_cpu(monkeypatch):
    recipe = replace(TINY, train=replace(TINY.train, seq_len=512))
    needed = 5 * 512**2  # a byte and a float for each pair of tokens
    monkeypatch.setattr(machine_plan, "available_ram", lambda: needed)
    plan_for_card(recipe)
    monkeypatch.setattr(machine_plan, "available_ram", lambda: needed - 1)
    with pytest.raises(UserError, match=r"a mask of each row's tokens by its tokens: 0.0 GiB for 512 of them"):
        plan_for_card(recipe)
