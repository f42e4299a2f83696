"""Runs on several processes: the same recipe, each process its own rows. Started by torchrun, as users do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.progress import read_metrics
from tests.conftest import ROOT

STEPS = 20
CPU = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
SCRIPT = """
import sys
from dataclasses import replace
from common.cli import run
from recipes.tiny import RECIPE, main

recipe = replace(RECIPE, train=replace(RECIPE.train, rows_per_step=12, save_every=8, eval_every=10))
sys.exit(run(main, recipe))
"""


def start(folder: Path, processes: int, *flags: str, steps: int = STEPS) -> subprocess.Popen[str]:
    """A run of the small model with twelve rows a step, on the CPU, one thread a process."""
    script = folder / "twelve_rows.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), "--max-steps", str(steps), *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=CPU)


def train(folder: Path, processes: int, *flags: str, name: str = "run", steps: int = STEPS) -> str:
    process = start(folder, processes, "--out", str(folder / name), *flags, steps=steps)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[..., tuple[Path, str]]:
    """runs(processes, steps): the folder of such a run, and what was printed. Each is made once."""
    folder = tmp_path_factory.mktemp("processes")

    @cache
    def run(processes: int, steps: int = STEPS) -> tuple[Path, str]:
        name = f"{processes}x{steps}"
        return folder / name, train(folder, processes, name=name, steps=steps)

    return run


def assert_same(together: Path, alone: Path) -> None:
    """The sums are the same up to their order, and so are losses, schedule, tokens and adapter."""
    entries, expected = read_metrics(together), read_metrics(alone)
    for key in ("loss", "eval_loss", "learning_rate", "tokens"):
        wanted = [(entry["step"], entry[key]) for entry in expected if key in entry]
        given = [(entry["step"], entry[key]) for entry in entries if key in entry]
        assert given == [(step, pytest.approx(value, rel=2e-4)) for step, value in wanted], key
    assert furthest(together, alone) < 1e-3


def furthest(a: Path, b: Path) -> float:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def test_two_processes_train_as_one_does(runs):
    """Six steps; one line of each kind is printed, by the first process, and run.json tells how many there were."""
    together, alone = runs(2, 6), runs(1, 6)
    assert_same(together[0], alone[0])
    for text in ("plan: ", "step 6/6 |", "the run on a page", "held-out exact match"):
        assert together[1].count(text) == 1, text
    assert "on each of 2 processes" in together[1]
    assert json.loads((together[0] / "run.json").read_text())["plan"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_twenty_steps_are_those_of_one_process(runs, processes):
    assert_same(runs(processes)[0], runs(1)[0])


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs, tmp_path):
    """SIGTERM in the middle, to torchrun; with another number of processes the sums are in another order."""
    process = start(tmp_path, 2, "--out", str(tmp_path / "run"))
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run")) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.count("stopped after step") == 1
    assert " GPUS=2 " in errors
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert "going on from" in train(tmp_path, 2, "--resume")
    assert furthest(tmp_path / "run", runs(2)[0]) == 0
    out = train(tmp_path, 1, "--resume", name="alone")
    assert "2 processes and is" in out
    assert_same(tmp_path / "alone", runs(1)[0])


@pytest.mark.slow
def test_rows_that_cannot_be_shared_are_one_line(tmp_path):
    process = start(tmp_path, 5, "--out", str(tmp_path / "run"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: TrainSpec.rows_per_step is 12, which 5 processes cannot share evenly" in errors


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["lean", "stock"])
def test_sharded_4_bit_weights_give_the_losses_of_one_process(kernels):
    """FSDP2 over two processes, each layer sharded by itself, with and without recompute: what a plan for models that
    do not fit one card stands on. No recipe uses it yet."""

    def losses(processes: int, kept: int) -> list[float]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [
            sys.executable,
            *(launcher if processes > 1 else []),
            "-m",
            "tests.fully_sharded",
            kernels,
            str(kept),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=CPU, timeout=200, check=True)
        return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss ")]

    alone = losses(1, 4)
    assert len(alone) == 5 and alone[-1] < 0.9 * alone[0]
    for kept in (4, 2, 0):
        assert losses(2, kept) == pytest.approx(alone, abs=2e-5)
