"""Processes of a machine share host memory: one copy of it, in no file that would be left when they are killed."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from common.machine.shared_memory import fill_once_per_machine, shared_memory
from tests.child_processes import wait_until
from tests.conftest import ROOT
from tests.machine.test_processes import CPU, children_of, launcher

LAYERS = 12
# Loads a model whose weights stream, trains it, and tells what it found; then it waits for its end.
SCRIPT = """
import json, os, re, sys, time
from pathlib import Path
import torch
if sys.argv[3] == "own":
    def refuse(*_):
        raise OSError("as on a system without it")
    os.memfd_create = refuse
from common.machine.collectives import barrier, init_distributed
from common.machine.layout import Layout
from common.machine.processes import rank
from common.model import attach_lora, load_4bit
from common.model.weight_streaming import weight_ring
from common.recipe import LoraSpec, ModelSpec

torch.set_num_threads(1)
init_distributed()
layers = int(sys.argv[4])
layout = Layout(2, on_host=layers, embedding_on_host=True)
model = attach_lora(load_4bit(ModelSpec(sys.argv[1]), layout=layout), LoraSpec(rank=4, alpha=8))
optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
for step in range(3):
    ids = torch.arange(5 + step + rank(), 21 + step + rank())[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
barrier()
place, shared = "", {"Rss": 0, "Pss": 0}
for line in Path("/proc/self/smaps").read_text().splitlines():
    if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
        place = line
    elif (field := line.split()[0].rstrip(":")) in shared and "/memfd:weights" in place:
        shared[field] += int(line.split()[1]) * 1024
status = Path("/proc/self/status").read_text()
outside = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]  # read once too
result = shared | {
    "losses": losses,
    "bytes": sum(tensor.nbytes for tensor in [*weight_ring(model).blocks, *outside]),
    "anonymous": next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) * 1024,
    "files": "/dev/shm/" in Path("/proc/self/maps").read_text(),
}
barrier()
path = Path(sys.argv[2]) / f"{sys.argv[3]}-{rank()}.json"
path.with_suffix(".part").write_text(json.dumps(result))
path.with_suffix(".part").rename(path)
time.sleep(600)
"""


@pytest.mark.slow  # four processes, 25 s
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux alone has it")
def test_two_processes_hold_the_weights_that_stream_once_and_in_no_file(small_model, tmp_path):
    folder = small_model("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=LAYERS, head_dim=128)
    (tmp_path / "script.py").write_text(SCRIPT)
    # glibc otherwise keeps what was freed.
    environment = CPU | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for kind in ("shared", "own"):
        arguments = [str(tmp_path / "script.py"), str(folder), str(tmp_path), kind, str(LAYERS)]
        with (tmp_path / f"{kind}.txt").open("w") as output:
            started = subprocess.Popen(
                [sys.executable, *launcher(2), *arguments],
                **{"env": environment, "cwd": ROOT, "stdout": output, "stderr": output},
            )
        try:
            paths = [tmp_path / f"{kind}-{rank}.json" for rank in range(2)]
            wait_until(lambda: started.poll() is not None or all(p.exists() for p in paths), "both have trained")  # noqa: B023
            text = (tmp_path / f"{kind}.txt").read_text()
            assert started.poll() is None, text[-3000:]
            assert text.count("once for the 2 processes of this machine") == (kind == "shared")
            assert text.count("the 2 processes of this machine cannot share host memory") == (kind == "own")
            found[kind] = [json.loads(path.read_text()) for path in paths]
            assert not any(process["files"] for process in found[kind])  # that a SIGKILL would leave
        finally:
            for process in (started.pid, *children_of(started.pid)):
                os.kill(process, signal.SIGKILL)
            started.wait()
    shared, own = found["shared"], found["own"]
    assert [process["losses"] for process in shared] == [process["losses"] for process in own]
    assert shared[0]["losses"] != shared[1]["losses"]  # of other rows
    size = shared[0]["bytes"]
    assert size > 16 << 20
    # Of a page that both have used each counts half. The second one has used some rows of the embedding alone.
    assert sum(process["Pss"] for process in shared) == pytest.approx(size, rel=0.01)
    assert [process["Rss"] for process in shared] == [pytest.approx(size, rel=0.1)] * 2
    assert all(process["Rss"] == 0 for process in own)
    for one, other in zip(shared, own, strict=True):
        assert other["anonymous"] - one["anonymous"] == pytest.approx(size, rel=0.2)


def test_a_process_that_is_alone_has_memory_of_its_own():
    assert shared_memory(1 << 20) is None
    block = fill_once_per_machine(8, lambda block: block.fill_(3), torch.ones(1))
    assert block.tolist() == [3] * 8
