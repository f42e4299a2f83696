"""What is checked before the processes of a run start, and what is said after one of them failed."""

import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common.exit_status import exit_status
from common.machine import launch as module
from common.machine.launch import (
    ERROR_STATUS,
    PEER_LOST_STATUS,
    _without_launch_flags,
    check_rendezvous,
    explain_failures,
    launch,
)
from common.recipe import TrainSpec, UserError
from tests.conftest import ROOT

TRAIN = TrainSpec(256, 16, 2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "GPUS=0 NNODES=1: both are at least 1"),
        ((1, 0), "GPUS=1 NNODES=0: both are at least 1"),
        ((1, 2), "NNODES needs RDZV_ENDPOINT=host:port"),
        ((1, 2, ""), "NNODES needs RDZV_ENDPOINT=host:port"),
        ((3,), "rows_per_step is 16, which 3 processes cannot share evenly: take 1, 2, 4, 8 or 16 GPUs, or a multiple"),
        ((3, 2, "localhost:1"), "which 6 processes cannot share evenly"),
        ((1, 2, "somewhere"), "RDZV_ENDPOINT=somewhere: it is host:port"),
        ((1, 2, "no-such-host.invalid:29500"), "this machine does not know no-such-host.invalid"),
    ],
)
def test_what_cannot_start_is_said_before_it_does(arguments, message):
    with pytest.raises(UserError, match=message):
        launch(TRAIN, *arguments)


def test_more_gpus_than_there_are_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="GPUS is 4, and this machine has 2"):
        launch(TRAIN, 4)


def test_a_port_that_is_free_will_do_and_one_of_another_program_will_not(monkeypatch):
    monkeypatch.setattr(module, "PROBE_TIMEOUT_SECONDS", 8)
    with socket.create_server(("", 0)) as place:
        port = place.getsockname()[1]
        with pytest.raises(UserError, match=f"RDZV_ENDPOINT=localhost:{port}: another program has this port"):
            check_rendezvous(f"localhost:{port}")
    check_rendezvous(f"localhost:{port}")


def test_a_machine_that_cannot_be_reached_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_SECONDS", 0)
    monkeypatch.setattr(module, "_is_local_address", lambda *_: False)
    with socket.create_server(("", 0)) as place:
        port = place.getsockname()[1]
    with pytest.raises(UserError, match=f"RDZV_ENDPOINT=localhost:{port} cannot be reached: Connection refused"):
        check_rendezvous(f"localhost:{port}")
    assert "waiting for localhost" in capsys.readouterr().out


def test_the_processes_get_the_command_without_what_started_them():
    given = ["-m", "recipes", "tiny", "--gpus", "2", "--out", "x", "--nnodes=2", "--rdzv-endpoint", "a:1", "--resume"]
    assert _without_launch_flags(given) == ["-m", "recipes", "tiny", "--out", "x", "--resume"]


def failures(**statuses: int) -> dict[int, SimpleNamespace]:
    return {int(rank[1:]): SimpleNamespace(exitcode=status) for rank, status in statuses.items()}


@pytest.mark.parametrize(
    ("statuses", "status", "line"),
    [
        ({"r1": -9}, 1, "process 1 was ended by SIGKILL (SIGKILL is what Linux does where host memory runs out)"),
        (
            {"r0": -15, "r1": -9},
            1,
            "process 1 was ended by SIGKILL",
        ),  # the first was ended because of the second
        ({"r0": PEER_LOST_STATUS, "r1": -11}, 1, "process 1 was ended by SIGSEGV; the others were ended too"),
        ({"r0": PEER_LOST_STATUS, "r2": 1}, 1, "process 2 failed, as its traceback says; the others were ended too"),
        ({"r0": -15}, 1, "process 0 was ended by SIGTERM"),
        ({"r0": ERROR_STATUS, "r1": -15}, ERROR_STATUS, None),  # it has printed the reason
        ({"r0": 128 + signal.SIGTERM, "r1": 128 + signal.SIGTERM}, 128 + signal.SIGTERM, None),
    ],
)
def test_the_process_that_ended_the_run_is_named(statuses, status, line):
    given, said = explain_failures(failures(**statuses))
    assert given == status
    assert (said is None) == (line is None)
    assert said is None or said.startswith(line or "")


def test_a_process_whose_partner_is_gone_ends_without_a_word(monkeypatch, capsys):
    def lose() -> None:
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:36420")

    with pytest.raises(RuntimeError):
        exit_status(lose, "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_status(lose, "out") == PEER_LOST_STATUS
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="something else"):
        exit_status(lambda: (_ for _ in ()).throw(RuntimeError("something else")), "out")


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(tmp_path):
    """The data file is missing. The second process has the same error, and is ended before it prints it."""
    command = [sys.executable, "-m", "recipes", "tiny", "--gpus", "2", "--data", "nowhere.jsonl"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == ERROR_STATUS
    assert done.stderr.count("error: ") == 1 and "nowhere.jsonl" in done.stderr, done.stderr
