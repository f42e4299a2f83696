"""Runs one training stack in a process of its own: its checkpoint, its rows, the card's free memory, how it ended."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.stacks import Job
from common import REPOSITORY
from common.machine.out_of_memory import out_of_memory

CHECKPOINTS = Path(tempfile.gettempdir()) / "qlora-bench"  # a folder for each model
LIMIT_SECONDS = 540  # that one process may take
TOO_LONG = "took longer than"
NOT_INSTALLED = "not installed"
Result = dict[str, Any]


def make_checkpoint_once(name: str) -> Path:
    """Makes the model's 4-bit checkpoint, unless an earlier benchmark has. Returns its folder."""
    folder = CHECKPOINTS / name
    if not (folder / "tokenizer.json").exists():  # the file that is written last
        subprocess.run([sys.executable, "-m", "benchmarks.models", name, str(folder)], check=True, cwd=REPOSITORY)
    return folder


def write_rows(path: Path, tokens: int, rows: int, folder: Path) -> None:
    """Writes rows of token ids, each of `tokens` ids and one example, made from the shipped conversations' text.

    folder: of the model whose tokenizer is used.
    """
    from transformers import AutoTokenizer

    lines = (REPOSITORY / "data" / "tiny" / "train.jsonl").read_text().splitlines()
    text = "\n".join(message["content"] for line in lines for message in json.loads(line)["messages"])
    stream = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, verbose=False)["input_ids"]
    stream *= -(-tokens * rows // len(stream))
    path.write_text("".join(json.dumps(stream[i * tokens : (i + 1) * tokens]) + "\n" for i in range(rows)))


@contextmanager
def limit_free_memory(gib: float | None) -> Iterator[None]:
    """Leaves only `gib` of the GPU's memory free inside the block. None, and no GPU, leave all."""
    if gib is None or not torch.cuda.is_available():
        yield
        return
    command = [sys.executable, "-m", "benchmarks.ballast", "--leave-gib", str(gib)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ballast:
        assert ballast.stdin and ballast.stdout
        said = ballast.stdout.readline().strip()
        if not said.startswith("ready"):  # it would be a measurement of the whole card
            raise RuntimeError("the ballast could not take the card's memory; its error is above")
        print(f"ballast {said}", flush=True)
        try:
            yield
        finally:
            ballast.stdin.close()


def run_stack(stack: str, job: Job, peers: str | None, seconds: float = LIMIT_SECONDS) -> Result:
    """Runs a stack in a process of its own. Returns its result, or under "failed" the reason in words.

    peers: a folder for the PYTHONPATH of the unsloth stacks. seconds: that the process may take.
    """
    environment = dict(os.environ)
    if peers and stack.startswith("unsloth"):
        environment["PYTHONPATH"] = os.pathsep.join([peers, str(REPOSITORY)])
        # Without common/process_state.py's other setting: an older torch refuses a name that it does not know.
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    with tempfile.TemporaryDirectory() as folder:
        # What unsloth compiles lies here, and not in the working folder, where the next setting of it would find it.
        environment["UNSLOTH_COMPILE_LOCATION"] = str(Path(folder) / "unsloth")
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(asdict(replace(job, started_at=time.time()))))
        command = [sys.executable, "-m", "benchmarks.stacks", stack, "--job", str(path)]
        try:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"stack": stack, "failed": f"{TOO_LONG} {seconds:.0f} s"}
    if done.returncode:
        return {"stack": stack, "failed": describe_failure(done.stderr, done.returncode)}
    # A library may still print something when the process ends.
    printed = next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"stack"'))
    result: Result = json.loads(printed)
    return result


# Beside the texts that common.machine.out_of_memory knows: names of exceptions, the C++ runtime's, and our own line.
OUT_OF_MEMORY = r"OutOfMemoryError|MemoryError|bad_alloc|out of (GPU|host|the host's) memory"


def describe_failure(stderr: str, status: int = 1) -> str:
    """The error that a process ended with, in a few words. status: as subprocess gives it, below 0 for a signal."""
    lines = [line for line in stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|error)\b", line)]
    if status == -signal.SIGKILL:
        return "killed by the system: out of host memory, most likely"
    last = (lines or stderr.splitlines() or ["no message"])[-1]
    if missing := re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", last):
        return f"{NOT_INSTALLED}: {missing[1]}"
    if out_of_memory(RuntimeError(last)) or re.search(OUT_OF_MEMORY, last):
        return "out of memory"
    return last[:200]


def tokens_per_s(result: Result) -> float:
    """The rate of the median step."""
    job = result["job"]
    rate: float = job["tokens"] * job["accumulation"] / statistics.median(result["seconds"])
    return rate
