"""Runs on several processes. Each trains its own rows, with the whole model (DDP) or a shard of each layer (FSDP2)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.run.metrics_file import read_metrics
from tests.conftest import ROOT, TINY

STEPS = 20
CPU = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
SCRIPT = """
import os
import sys
from dataclasses import replace
from common.cli import run
from recipes.tiny import RECIPE, main

sharding = os.environ["SHARDING"]
recipe = replace(RECIPE, train=replace(RECIPE.train, rows_per_step=12, save_every=8, eval_every=10, sharding=sharding))
sys.exit(run(main, recipe))
"""
Sharding = Literal["never", "always"]
BOTH: tuple[Sharding, ...] = ("never", "always")


def launcher(processes: int) -> list[str]:
    """Returns the arguments of Python that start several processes with torchrun; none for one."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []


def start(
    folder: Path, processes: int, *flags: str, steps: int = STEPS, sharding: Sharding = "never"
) -> subprocess.Popen[str]:
    """Starts a run of the small model with twelve rows a step, on the CPU, with one thread a process."""
    script = folder / "twelve_rows.py"
    script.write_text(SCRIPT)
    several = ["--gpus", str(processes)] if processes > 1 else []
    command = [sys.executable, str(script), *several, "--max-steps", str(steps), *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=CPU | {"SHARDING": sharding})


def train(
    folder: Path, processes: int, *flags: str, name: str = "run", steps: int = STEPS, sharding: Sharding = "never"
) -> str:
    process = start(folder, processes, "--out", str(folder / name), *flags, steps=steps, sharding=sharding)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[..., tuple[Path, str]]:
    """runs(processes, steps, sharding): the folder of such a run, and what it printed. Each run is made once."""
    folder = tmp_path_factory.mktemp("processes")

    @cache
    def make(processes: int, steps: int, sharding: Sharding) -> tuple[Path, str]:
        name = f"{processes}x{steps}-{sharding}"
        return folder / name, train(folder, processes, name=name, steps=steps, sharding=sharding)

    def run(processes: int, steps: int = STEPS, sharding: Sharding = "never") -> tuple[Path, str]:
        return make(processes, steps, sharding)  # in one form: a cache takes runs(2) and runs(2, 20) for two

    return run


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(folder)) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def assert_same(together: Path, alone: Path) -> None:
    """Losses, learning rates, tokens, adapter and drift are the same, up to the order in which sums are added up."""
    entries, expected = read_metrics(together), read_metrics(alone)
    for key in ("loss", "eval_loss", "learning_rate", "tokens"):
        wanted = [(entry["step"], entry[key]) for entry in expected if key in entry]
        given = [(entry["step"], entry[key]) for entry in entries if key in entry]
        assert given == [(step, pytest.approx(value, rel=2e-4)) for step, value in wanted], key
    assert furthest(together, alone) < 1e-3
    ours, theirs = (json.loads((folder / "run.json").read_text())["drift"] for folder in (together, alone))
    assert ours == {
        name: pytest.approx(value, rel=1e-2) if isinstance(value, float) else value for name, value in theirs.items()
    }


def furthest(a: Path, b: Path) -> float:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", BOTH)
def test_two_processes_train_as_one_does(runs, sharding):
    """Six steps. The main process alone prints, and run.json holds the number of processes."""
    (together, text), alone = runs(2, 6, sharding), runs(1, 6)[0]
    assert_same(together, alone)
    for line in ("plan: ", "step 6/6 |", "the run on a page", "held-out exact match"):
        assert text.count(line) == 1, line
    assert "on each of 2 processes" in text
    layout = json.loads((together / "run.json").read_text())["plan"]["layout"]
    assert layout == {"processes": 2, "sharded": sharding == "always", "on_host": 0, "embedding_on_host": False}
    assert ("layers sharded over 2 cards" if sharding == "always" else "data parallel") in text


@pytest.mark.slow
@pytest.mark.parametrize("sharding", BOTH)
@pytest.mark.parametrize("processes", [2, 3])
def test_twenty_steps_are_those_of_one_process(runs, processes, sharding):
    assert_same(runs(processes, sharding=sharding)[0], runs(1)[0])


@pytest.mark.slow
def test_the_adapter_of_sharded_layers_is_one_that_peft_loads(runs):
    folder = runs(2, 6, "always")[0]
    base = AutoModelForCausalLM.from_pretrained(TINY)
    model = PeftModel.from_pretrained(base, folder)
    loaded, stored = dict(model.named_parameters()), load_file(folder / "adapter_model.safetensors")
    assert len(stored) == len([name for name in loaded if "lora_" in name])
    for name, tensor in stored.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", BOTH)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs, tmp_path, sharding):
    """SIGTERM in the middle. With another number of processes, or another layout, sums are added in another order."""
    process = start(tmp_path, 2, "--out", str(tmp_path / "run"), sharding=sharding)
    wait_for_steps(process, tmp_path / "run", 6)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and errors.count("stopped after step") == 1
    assert " GPUS=2 " in errors
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert "going on from" in train(tmp_path, 2, "--resume", sharding=sharding)
    assert furthest(tmp_path / "run", runs(2, sharding=sharding)[0]) == 0
    out = train(tmp_path, 1, "--resume", name="alone")
    assert "2 processes and is" in out
    assert_same(tmp_path / "alone", runs(1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("sharding", BOTH)
def test_a_process_that_dies_ends_the_others_and_is_named(runs, tmp_path, sharding):
    process = start(tmp_path, 2, "--out", str(tmp_path / "run"), sharding=sharding)
    wait_for_steps(process, tmp_path / "run", 10)  # there is a checkpoint, of step 8
    second = next(pid for pid, rank in children_of(process.pid).items() if rank == "1")
    os.kill(second, signal.SIGKILL)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 60
    lines = [line for line in errors.splitlines() if line.strip()]
    assert process.returncode == 1
    assert len(lines) == 1 and lines[0].startswith("error: process 1 was ended by SIGKILL"), errors
    assert "going on from" in train(tmp_path, 2, "--resume", sharding=sharding)
    assert furthest(tmp_path / "run", runs(2, sharding=sharding)[0]) == 0


def children_of(pid: int) -> dict[int, str]:
    """Returns the processes that this one started, with their ranks."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        found[int(child)] = next((v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")), "")
    return found


@pytest.mark.slow
def test_two_machines_meet_and_train_as_one(runs, tmp_path):
    """Both machines are this one; each starts one process."""
    with socket.create_server(("", 0)) as place:
        meet = f"localhost:{place.getsockname()[1]}"
    flags = ("--nnodes", "2", "--rdzv-endpoint", meet, "--out", str(tmp_path / "run"))
    processes = [start(tmp_path, 1, *flags, steps=6) for _ in range(2)]
    texts = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert_same(tmp_path / "run", runs(1, 6)[0])


@pytest.mark.slow
def test_two_processes_share_the_rows_that_auto_takes_for_them(tmp_path):
    """385 rows, two epochs: 98 steps of 8 rows, 194 of 4. Three of them, on one process and on two."""
    script = tmp_path / "auto.py"
    script.write_text(SCRIPT.replace("rows_per_step=12", 'rows_per_step="auto"'))
    for processes in (1, 2):
        several = ["--gpus", "2"] if processes == 2 else []
        command = [sys.executable, str(script), *several, "--max-steps", "3", "--out", str(tmp_path / str(processes))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=CPU | {"SHARDING": "never"})
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("optimizer steps: 97 an epoch (385 packed rows, 4 a step); the run takes 3") == 1
    assert_same(tmp_path / "2", tmp_path / "1")


LATE_SCRIPT = """
import os, pathlib, sys, time
from dataclasses import replace
from common.cli import run
from recipes.llama3_8b import RECIPE, main

is_dir = pathlib.Path.is_dir
if os.environ["RANK"] == "1":  # its disk answers when the first process has failed already
    pathlib.Path.is_dir = lambda self, **how: time.sleep(5 * self.match("late_run")) or is_dir(self, **how)
# With a date of its own the first process does not wait for the second one before it fails.
sys.exit(run(main, replace(RECIPE, model=replace(RECIPE.model, template_date="2026-11-27"))))
"""


@pytest.mark.slow  # 20 s: a process that is not the first waits 10 s with what it says
def test_processes_that_fail_for_one_reason_name_that_one_and_no_disk(tmp_path):
    """As on two machines, where no launcher ends the second process before it speaks."""
    (tmp_path / "late.py").write_text(LATE_SCRIPT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "late.py"), "--out", str(tmp_path / "late_run")],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT},
            env=CPU | group | {"MASTER_PORT": port, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    for text in errors:
        assert "needs an NVIDIA GPU" in text and "card_gib=None" in text
        assert "a disk that they share" not in text


@pytest.mark.slow
def test_two_processes_whose_weights_stream_train_to_the_same_bits(runs, tmp_path):
    """DistributedDataParallel sends all parameters at its start, but for those that lie in the ring."""
    expected, _ = runs(2)
    out = train(tmp_path, 2, "--set", "train.weights_on_host=4 train.embedding_on_host=True")
    assert "the weights of 4 layers and the embedding in host memory" in out
    assert furthest(tmp_path / "run", expected) == 0
