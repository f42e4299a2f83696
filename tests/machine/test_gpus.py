"""Which GPU a process computes on: with nvidia-smi's and NVML's answers faked, and the real parsing of both."""

import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from common.commands.flags import choose_gpu
from common.machine.gpus import list_gpus, shown_gpus, use_one_gpu
from common.recipe import UserError
from tests.conftest import ROOT

TWO = """GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-11aa2f6e-0000-0000-0000-000000000000)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22bb2f6e-0000-0000-0000-000000000000)
  MIG 1g.5gb      Device  0: (UUID: MIG-33cc2f6e-0000-0000-0000-000000000000)
"""


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs that torch was built for; nothing is exported."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that it is as it was after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 2)
    answer = subprocess.CompletedProcess((), 0, TWO)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)


@pytest.mark.parametrize(
    ("exported", "kept"),
    [
        (None, "0"),
        ("1", "1"),
        ("1,0", "1"),
        (" 1 , 0", "1"),
        ("GPU-22bb,GPU-11aa", "GPU-22bb"),
        ("MIG-33cc2f6e,MIG-44dd", "MIG-33cc2f6e"),
        ("0,-1", "0,-1"),  # CUDA shows one as well
        ("", ""),
        ("-1", "-1"),
        ("none", "none"),
    ],
)
def test_one_process_keeps_the_first_gpu_that_it_is_shown_and_says_so(two_gpus, monkeypatch, capsys, exported, kept):
    if exported is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", exported)
    use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == kept
    said = capsys.readouterr().err
    assert bool(said) == (exported is not None and exported != kept)
    assert not said or f"={exported} names 2 GPUs, and this process computes on the first, {kept}. GPU=1" in said


@pytest.mark.parametrize(
    ("exported", "wanted", "kept", "order"),
    [(None, "1", "1", "PCI_BUS_ID"), (None, "0", "0", "PCI_BUS_ID"), ("1,0", "1", "0", None), ("1", "0", "1", None)],
)
def test_gpu_takes_another_one_of_those_that_are_shown(two_gpus, monkeypatch, capsys, exported, wanted, kept, order):
    if exported is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", exported)
    use_one_gpu(wanted)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("CUDA_DEVICE_ORDER")) == (kept, order)
    assert torch.cuda.device_count() == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("exported", "wanted", "message"),
    [
        (None, "2", "GPU=2: 2 is no GPU of this machine, which has 0 .NVIDIA GeForce RTX 4090., 1 .NVIDIA A100"),
        (None, "t4", "GPU=t4: it is a number from 0 on"),
        (None, "-1", "GPU=-1: it is a number from 0 on"),
        ("1", "1", "GPU=1: CUDA_VISIBLE_DEVICES=1 shows 1, counted from GPU=0"),
        ("", "0", "GPU=0: CUDA_VISIBLE_DEVICES= shows none, counted from GPU=0"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(two_gpus, monkeypatch, exported, wanted, message):
    if exported is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", exported)
    with pytest.raises(UserError, match=message):
        use_one_gpu(wanted)


def test_gpu_on_a_machine_without_one_is_one_line(two_gpus, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: False)
    with pytest.raises(UserError, match="GPU=0: this machine has no NVIDIA GPU that torch can see"):
        use_one_gpu("0")


def test_the_list_of_nvidia_smi_is_read_with_its_mig_instances(two_gpus):
    assert [(uuid[:8], name) for uuid, name in list_gpus().items()] == [
        ("GPU-11aa", "NVIDIA GeForce RTX 4090"),
        ("GPU-22bb", "NVIDIA A100-SXM4-40GB"),
        ("MIG-33cc", "MIG 1g.5gb      Device  0:"),
    ]


@pytest.mark.parametrize(
    ("variable", "shown"), [(None, None), ("0,x,1", ["0"]), ("NoDevFiles", []), ("2,GPU-1", ["2", "GPU-1"])]
)
def test_the_variable_is_read_as_cuda_reads_it(two_gpus, monkeypatch, variable, shown):
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert shown_gpus() == shown


@pytest.mark.parametrize(
    ("flags", "launched"),
    [({"gpus": 2}, False), ({"gpus": 1, "nnodes": 2}, False), ({"nnodes": 2}, False), ({}, True)],
)
def test_what_is_or_starts_a_process_of_several_hides_none_and_takes_no_gpu(two_gpus, monkeypatch, flags, launched):
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "1")
    choose_gpu(Namespace(**{"gpu": None, "gpus": None, "nnodes": 1} | flags))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    with pytest.raises(UserError, match="GPU=1 is for a run in one process"):
        choose_gpu(Namespace(**{"gpu": "1", "gpus": None, "nnodes": 1} | flags))


@pytest.mark.parametrize(("typed", "shown"), [("1", "1"), ("0", "0"), ("t4", None), ("4090", None)])
def test_a_plan_takes_a_number_as_a_run_does_and_hides_no_gpu_for_the_name_of_one(two_gpus, typed, shown):
    choose_gpu(Namespace(gpu=typed, gpus=None, nnodes=1, plans_for_kinds=True))
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == shown


def test_a_plan_for_two_cards_of_a_kind_asks_for_no_process(two_gpus):
    choose_gpu(Namespace(gpu="t4", gpus=2, nnodes=1, plans_for_kinds=True))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


# `python -m recipes ...` on a machine with two GPUs, with NVML's answer faked, and what would be started shown.
LAUNCHER = """
import os, sys
import common  # before torch, as a command does
import torch
torch.cuda._is_compiled = lambda: True
torch.cuda._raw_device_count_nvml = lambda: 2
torch._C._cuda_getDeviceCount = lambda: 0  # nothing computes here
from torch.distributed.launcher import api
def elastic_launch(config, program):
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return lambda *arguments: print("started:", config.nproc_per_node, "see", shown)
api.elastic_launch = elastic_launch
from recipes.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("typed", "exported", "says"),
    [
        ("finetune tiny --gpus 2", None, "started: 2 see None"),
        ("dryrun tiny --gpus 2", "1,0", "started: 2 see 1,0"),
        ("finetune tiny --gpus 4", None, "error: GPUS is 4, and this machine has 2"),
        ("finetune tiny --gpus 2", "1", "error: GPUS is 2, and CUDA_VISIBLE_DEVICES=1 shows 1"),
    ],
)
def test_a_run_on_two_gpus_starts_two_processes_that_see_what_was_exported(tmp_path, typed, exported, says):
    clean = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")}
    told = {} if exported is None else {"CUDA_VISIBLE_DEVICES": exported}
    command = [sys.executable, "-c", LAUNCHER, *typed.split(), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=clean | told, cwd=ROOT, capture_output=True, text=True)
    assert says in done.stdout + done.stderr
