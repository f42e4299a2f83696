from dataclasses import replace

import pytest
import torch

from common.machine.device import Machine
from common.plan.plan import Plan
from common.run.run_json import full_line, memory_line, run_metrics
from tests.run.test_training import split

GIB = 1 << 30
STEP = {"seconds": 1.0, "tokens": 100, "tokens_per_s": 100.0}
HISTORY = [
    {"step": 0, "eval_loss": 5.0},
    {"step": 1, "loss": 4.0, **STEP},
    {"step": 2, "skipped": "its numbers were not finite"},
    {"step": 3, "loss": 2.0, **STEP, "seconds": 3.0},
    {"step": 3, "eval_loss": 1.5},
]


@pytest.fixture
def plan(recipe) -> Plan:
    return replace(split(recipe, 2), peak_bytes=4 * GIB)


def test_the_numbers_of_a_run_are_those_of_its_first_and_last_steps(plan):
    metrics = run_metrics(3, HISTORY, plan, ["step 2: every layer recomputes"])
    assert (metrics["first_loss"], metrics["last_loss"]) == (4.0, 2.0)
    assert (metrics["eval_loss_before"], metrics["eval_loss"]) == (5.0, 1.5)
    assert (metrics["steps"], metrics["seconds"], metrics["tokens"]) == (3, 3.0, 100)
    assert metrics["predicted_bytes"] == 4 * GIB and metrics["allocated_bytes"] is None  # a CPU counts none


def test_without_held_out_rows_there_is_no_held_out_loss(plan):
    metrics = run_metrics(1, HISTORY[1:2], plan, [])
    assert metrics["eval_loss_before"] is None and metrics["eval_loss"] is None


def test_the_memory_line_compares_what_was_planned_with_what_was_measured(plan):
    metrics = run_metrics(3, HISTORY, plan, ["step 2: every layer recomputes"])
    assert memory_line(metrics).endswith("GiB of RAM; a plan predicts that of a GPU only")
    line = memory_line(metrics | {"allocated_bytes": 3 * GIB})
    assert line.startswith("peak memory: predicted 4.00 GiB, measured 3.00 GiB allocated (-25.0%), ")
    assert line.endswith("GiB reserved\n  out of memory in step 2: every layer recomputes")


def test_a_gpu_that_was_full_is_said_once_with_what_it_means(monkeypatch):
    gpu = Machine(torch.device("cuda", 0), torch.bfloat16, "a test", "a GPU")
    for counts, words in (
        ({}, None),  # before the first allocation torch counts nothing
        ({"num_alloc_retries": 0, "num_ooms": 0}, None),
        ({"num_alloc_retries": 3, "num_ooms": 0}, "the GPU was full 3 times: torch waited for it, gave back"),
        ({"num_alloc_retries": 3, "num_ooms": 1}, "asked again, and once that was not enough (out of memory). That"),
    ):
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device, counts=counts: counts)
        line = full_line([gpu.full_times()])
        assert line is None if words is None else words in line and "\n" not in line
    assert full_line([(0, 0), (1, 0)]).startswith("the fullest of 2 GPUs was full once: ")
