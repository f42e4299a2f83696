"""Two processes of one machine tell each other what they have."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from common.cli import run
from common.machine.collectives import all_gather, all_reduce_max, all_reduce_sum, broadcast_from_main, run_on_main
from common.machine.shared_memory import MIN_SHARED_BYTES, read_once_per_machine
from common.model.adapter_files import ADAPTER_WEIGHTS
from common.recipe import Stopped
from tests.conftest import ROOT
from tests.machine.test_processes import CPU, launcher

SCRIPT = """
import json
import sys
from pathlib import Path
import torch
from common.machine.collectives import *
from common.machine.processes import rank
from common.machine.shared_memory import MIN_SHARED_BYTES, read_once_per_machine

torch.set_num_threads(1)
init_distributed()
print("a line of one process")
reads = []

def read(scale):
    reads.append(scale)
    return [torch.arange(MIN_SHARED_BYTES // 4, dtype=torch.float32) * scale, torch.arange(6).view(2, 3) + scale]

tensors = read_once_per_machine(torch.device("cpu"), read, 3)
result = {
    "all_gather": all_gather(f"of {rank()}"),
    "broadcast": broadcast_from_main(f"of {rank()}"),
    "sum": all_reduce_sum([1.5 + rank(), 2]),
    "max": all_reduce_max(7 * rank()),
    "run_on_main": run_on_main(lambda: "done"),
    "reads": len(reads),
    "tensors": [[str(t.dtype), list(t.shape), float(t.double().sum())] for t in tensors],
}
with open(f"{sys.argv[1]}/{rank()}.json", "w") as file:
    json.dump(result, file)
shut_down_distributed()
"""


@pytest.mark.slow
def test_two_processes_get_each_others_values_and_read_tensors_once(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *launcher(2), str(script), str(tmp_path)], env=CPU, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (main.pop("run_on_main"), other.pop("run_on_main")) == ("done", None)
    assert (main.pop("reads"), other.pop("reads")) == (1, 0)
    count = MIN_SHARED_BYTES // 4
    assert (
        main
        == other
        == {
            "all_gather": ["of 0", "of 1"],
            "broadcast": "of 0",
            "sum": [4.0, 4.0],  # 1.5 + 2.5, 2 + 2
            "max": 7,
            "tensors": [
                ["torch.float32", [count], pytest.approx(3 * count * (count - 1) / 2, rel=1e-6)],
                ["torch.int64", [2, 3], 15 + 6 * 3],
            ],
        }
    )
    assert done.stdout.count("a line of one process") == 1


def test_a_single_process_gets_its_own_values():
    assert all_gather("mine") == ["mine"]
    assert broadcast_from_main("mine") == "mine"
    assert all_reduce_sum([1.5, 2]) == [1.5, 2]
    assert all_reduce_max(7) == 7
    assert run_on_main(lambda: "done") == "done"
    (tensor,) = read_once_per_machine(torch.device("cpu"), lambda n: [torch.arange(n)], 3)
    assert tensor.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("stop", "status"), [(None, 0), (Stopped("stopped after step 3", 15), 143)])
def test_a_process_of_torchrun_is_connected_for_cpu_and_gpu_and_disconnected_at_the_end(
    recipe, monkeypatch, stop, status
):
    """Also the only one: accelerate would connect it with NCCL alone. NCCL warns of processes that stay connected."""
    with socket.create_server(("", 0)) as place:
        port = str(place.getsockname()[1])
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    sums = []

    def story(_):
        assert distributed.is_initialized()
        sums.extend(all_reduce_sum([1.5, 2]))
        if stop:
            raise stop
        Path(recipe.out, ADAPTER_WEIGHTS).touch()

    assert run(story, recipe, []) == status
    assert sums == [1.5, 2]
    assert not distributed.is_initialized()
