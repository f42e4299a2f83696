"""Terminals that are closed and readers that leave, with real ones: a run stops with a checkpoint, or goes on."""

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.cli import run
from common.machine.launch import ONE_SIGNAL_SECONDS
from common.process_state import protect_output
from common.recipe import Recipe
from common.run.metrics_file import read_metrics
from common.run.stopping import StopSignals
from tests.child_processes import ended, wait_until
from tests.conftest import ROOT, TRAIN
from tests.run.test_faults import forked, main
from tests.run_make import OF_MAKE, VARIABLES


def in_terminal(action: Callable[[], int]) -> tuple[int, int]:
    """The id of a process that does it in a session and on a terminal of its own, and the terminal's other end."""
    child, terminal = pty.fork()
    if child:
        return child, terminal
    status = 1
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        protect_output(outlives_reader=True)
        status = action()
    finally:
        os._exit(status)


def wait_for_steps(folder: str, count: int, terminal: int | None = None) -> None:
    """Reads the terminal meanwhile, as its window does."""
    deadline = time.monotonic() + 300
    while sum("loss" in entry for entry in read_metrics(Path(folder))) < count:
        assert time.monotonic() < deadline
        if terminal is not None and select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 10_000)
        time.sleep(0.01)


def checkpoints_of(folder: str) -> list[str]:
    return [path.name for path in (Path(folder) / "checkpoints").iterdir()]


@pytest.fixture
def endless(recipe) -> Recipe:
    """Without a checkpoint of its own accord."""
    return replace(recipe, train=replace(recipe.train, max_steps=10_000, save_every=10_000, eval_every=10_000))


@pytest.mark.parametrize("more", [(signal.SIGHUP,), (signal.SIGHUP, signal.SIGTERM)])
def test_a_closed_terminal_stops_the_run_with_a_checkpoint(endless, more):
    """more: what the shell and the end of the session send as well."""
    child, terminal = in_terminal(lambda: run(main, endless, []))
    wait_for_steps(endless.out, 3, terminal)
    os.close(terminal)
    for number in more:
        os.kill(child, number)
    assert ended(child) == 128 + more[-1]
    (checkpoint,) = checkpoints_of(endless.out)
    assert checkpoint == f"checkpoint-{read_metrics(Path(endless.out))[-1]['step']}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_from_several_senders_is_one(capsys, number):
    """Each is handled before the next one comes, as in a process that waits."""
    with StopSignals() as stop:
        for _ in range(3):
            signal.raise_signal(number)
        time.sleep(2 * ONE_SIGNAL_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert stop.received == number
    assert capsys.readouterr().out.count("once more stops at once") == 1


def test_a_run_that_ignores_sighup_goes_on(recipe, tmp_path):
    recipe = replace(recipe, train=replace(recipe.train, max_steps=20))

    def ignore() -> None:  # as nohup does
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    child = forked(recipe, tmp_path / "log", before=ignore)
    wait_for_steps(recipe.out, 3)
    os.kill(child, signal.SIGHUP)
    assert ended(child) == 0
    assert (Path(recipe.out) / "report.html").exists()


def test_a_reader_that_leaves_does_not_end_the_run(recipe, tmp_path):
    reads, writes = os.pipe()

    def no_reader() -> None:
        os.dup2(writes, 1)
        os.close(reads)
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # as in a new process: kept, and with them the files
        protect_output(outlives_reader=True)

    child = forked(recipe, tmp_path / "errors", before=no_reader)
    os.close(writes)
    os.close(reads)
    assert ended(child) == 0
    assert (Path(recipe.out) / "adapter_model.safetensors").exists()
    said = (tmp_path / "errors").read_text()
    assert said == "warning: standard output is lost (Broken pipe); the work goes on without it\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_while_the_last_files_are_written_waits_for_them(recipe, tmp_path, number):
    child = forked(recipe, tmp_path / "log")
    wait_until((Path(recipe.out) / "adapter_model.safetensors").exists, "the adapter")
    os.kill(child, number)
    assert ended(child) == 128 + number
    assert {"run.json", "report.html", "loss.png"} <= {path.name for path in Path(recipe.out).iterdir()}
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("stopped after the last step; the run is whole, in") and "Go on" not in last


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_closing_the_terminal_of_make_stops_all_processes_with_one_checkpoint(tmp_path, processes):
    out = str(tmp_path / "run")
    gpus = "GPUS=2" if processes == 2 else ""
    command = f"make finetune OUT={out} DATA={TRAIN} {gpus}; true"  # the shell leads the session, and ends at once
    shell, terminal = pty.fork()
    if not shell:
        try:
            os.chdir(ROOT)
            environment = {name: value for name, value in os.environ.items() if name not in OF_MAKE | VARIABLES}
            os.execvpe("bash", ["bash", "-c", command], environment)
        finally:
            os._exit(1)
    wait_for_steps(out, 3, terminal)
    os.close(terminal)
    assert ended(shell) == -signal.SIGHUP
    deadline = time.monotonic() + 120
    while not (there := checkpoints_of(out)) or not there[0].startswith("checkpoint-"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)  # in which a run that goes on would take further steps
    assert checkpoints_of(out) == [f"checkpoint-{read_metrics(Path(out))[-1]['step']}"]
