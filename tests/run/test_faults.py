"""Runs that are killed, stopped and starved of disk: they end at the same adapter, or with a line that says why.

Each run is a process forked from this one, which has everything imported. The stock stack, measured: of 15 kills with a
checkpoint on disk 6 could not go on and 1 ended elsewhere.
"""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.cli import run
from common.machine import disk
from common.machine.launch import ERROR_STATUS
from common.recipe import LoraSpec, Recipe
from common.run import checkpoints
from common.run.training import train
from tests.child_processes import ended, wait_until
from tests.run.test_training import adapter, prepare

STEPS = 6


def main(recipe: Recipe) -> None:
    train(*prepare(recipe))


def forked(
    recipe: Recipe,
    log: Path,
    *flags: str,
    before: Callable[[], None] = lambda: None,
    story: Callable[[Recipe], object] = main,
) -> int:
    """The process id of a run of the recipe; what it prints goes to `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        before()
        status = run(story, recipe, list(flags))
    finally:
        sys.stdout.flush()
        os._exit(status)


@pytest.fixture(autouse=True)
def one_thread():
    assert torch.get_num_threads() == 1  # a forked process has no others


@pytest.fixture
def long_run(recipe):
    """With dropout, so that random numbers must go on where they were, and a checkpoint after each step."""
    train_spec = replace(recipe.train, max_steps=STEPS, save_every=1)
    return replace(recipe, train=train_spec, lora=LoraSpec(4, 8, dropout=0.1))


def die_in_writing(at: int) -> Callable[[], None]:
    """Kills the process at the so-manieth file operation of a checkpoint's sealing."""

    def before() -> None:
        left = at

        def counted(operation):
            def wrapped(*arguments, **named):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*arguments, **named)

            return wrapped

        checkpoints.sha256_of = counted(checkpoints.sha256_of)
        disk.fsync = counted(disk.fsync)
        Path.rename = counted(Path.rename)
        disk.shutil.rmtree = counted(disk.shutil.rmtree)

    return before


def kill_and_resume(recipe: Recipe, kills: int, tmp_path: Path) -> int:
    """How many of so many killed and resumed runs end at the adapter of an uninterrupted one, bit for bit."""
    started = time.monotonic()
    assert ended(forked(replace(recipe, out=str(tmp_path / "whole")), tmp_path / "whole.log")) == 0
    seconds, expected = time.monotonic() - started, adapter(tmp_path / "whole")
    dice, identical, killed = random.Random(0), 0, 0
    for number in range(kills):
        broken, log = replace(recipe, out=str(tmp_path / str(number))), tmp_path / f"{number}.log"
        if number % 2:
            child = forked(broken, log)
            time.sleep(dice.uniform(0.1, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
        else:  # about 30 operations a checkpoint
            child = forked(broken, log, before=die_in_writing(dice.randint(1, 30 * STEPS)))
        status = ended(child)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        assert ended(forked(broken, log, "--resume")) == 0, log.read_text()
        got = adapter(broken.out)
        identical += all(torch.equal(got[name], expected[name]) for name in expected)
        names = {path.name for path in (Path(broken.out) / "checkpoints").iterdir()}
        assert names == {f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"}, names
    assert killed > kills / 2  # the others were done before
    return identical


def test_pitfall_28_a_killed_run_ends_at_the_same_adapter(long_run, tmp_path):
    assert kill_and_resume(long_run, 3, tmp_path) == 3


@pytest.mark.slow
def test_a_hundred_killed_runs_end_at_the_same_adapter(long_run, tmp_path):
    assert kill_and_resume(long_run, 100, tmp_path) == 100


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_pitfall_31_a_stopped_run_says_how_to_go_on_and_ends_at_the_same_adapter(long_run, tmp_path, number):
    recipe = replace(long_run, train=replace(long_run.train, max_steps=40, save_every=1000))
    assert ended(forked(replace(recipe, out=str(tmp_path / "whole")), tmp_path / "whole.log")) == 0
    broken, log = replace(recipe, out=str(tmp_path / "broken")), tmp_path / "broken.log"
    child = forked(broken, log)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, "three steps")
    os.kill(child, number)
    assert ended(child) == 128 + number
    last = log.read_text().splitlines()[-1]
    step = int(last.split("stopped after step ")[1].split(" of 40.")[0])
    assert last.endswith("Go on with: make finetune MODEL=test-faults ARGS=--resume")
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == [f"checkpoint-{step}"]
    assert not (tmp_path / "broken" / "adapter_model.safetensors").exists()
    assert ended(forked(broken, log, "--resume")) == 0
    assert f"going on from {broken.out}/checkpoints/checkpoint-{step}" in log.read_text()
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("whole", [0, 1])
def test_a_second_signal_stops_at_once_and_names_the_newest_whole_checkpoint(long_run, tmp_path, whole):
    """whole: checkpoints that are whole when another one is being written."""
    folder, stock = Path(long_run.out) / "checkpoints", disk.fsync

    def is_written() -> bool:
        return checkpoints.staging_folder(folder).exists() and len(checkpoints.list_checkpoints(folder)) == whole

    def slow_steps() -> None:
        disk.fsync = lambda file: time.sleep(60) if is_written() else stock(file)

    log = tmp_path / "log"
    child = forked(long_run, log, before=slow_steps)
    wait_until(is_written, "a checkpoint being written")
    for _ in range(2):
        os.kill(child, signal.SIGINT)
        time.sleep(0.5)
    assert ended(child) == 130
    hint = ". Go on with: make finetune MODEL=test-faults ARGS=--resume"
    named = f"stopped at once; the newest checkpoint is {folder / 'checkpoint-1'}{hint}"
    assert log.read_text().splitlines()[-1] == (named if whole else "stopped")
    assert "stopping after this step, with a checkpoint; once more stops at once" in log.read_text()


def small_files(limit: int) -> Callable[[], None]:
    """A quota: no file may grow beyond so many bytes."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return before


def test_pitfall_30_where_no_checkpoint_can_be_written_training_goes_on_and_says_so(long_run, tmp_path):
    """The optimizer's states do not fit, the adapter does: the run ends with an adapter and without checkpoints."""
    log = tmp_path / "log"
    recipe = replace(long_run, lora=LoraSpec(16, 16))
    assert ended(forked(replace(recipe, out=str(tmp_path / "free")), log)) == 0
    size = (tmp_path / "free" / "adapter_model.safetensors").stat().st_size
    assert size < (tmp_path / "free" / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt").stat().st_size
    child = forked(recipe, log, before=small_files(int(1.2 * size)))
    assert ended(child) == 0, log.read_text()
    assert log.read_text().count("cannot be written") == STEPS
    assert "training goes on, the last checkpoint is none yet" in log.read_text()
    assert list((Path(recipe.out) / "checkpoints").iterdir()) == []
    same, free = adapter(recipe.out), adapter(tmp_path / "free")
    assert all(torch.equal(same[name], free[name]) for name in free)


def test_where_nothing_can_be_written_the_run_ends_with_one_line(long_run, tmp_path):
    log = tmp_path / "log"
    assert ended(forked(long_run, log, before=small_files(4000))) == ERROR_STATUS
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in log.read_text(), log.read_text()


@pytest.mark.slow  # test_resume.py has one in the default tier
@pytest.mark.parametrize("damage", ["truncated", "a byte flipped"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(long_run, tmp_path, damage):
    log = tmp_path / "log"
    whole = replace(long_run, out=str(tmp_path / "whole"))
    assert ended(forked(whole, log)) == 0
    expected = adapter(whole.out)
    dice = random.Random(1)
    for name in ("optimizer.pt", "adapter_model.safetensors", "rng_state.pth", "trainer_state.json"):
        path = Path(whole.out) / "checkpoints" / f"checkpoint-{STEPS}" / name
        content = path.read_bytes()
        at = dice.randrange(len(content))
        path.write_bytes(
            content[:at] + (b"" if damage == "truncated" else bytes([content[at] ^ 4]) + content[at + 1 :])
        )
        assert ended(forked(whole, log, "--resume")) == 0, log.read_text()
        assert f"checkpoint-{STEPS} is damaged ({name} " in log.read_text()
        assert f"going on from {whole.out}/checkpoints/checkpoint-{STEPS - 1}" in log.read_text()
        assert all(torch.equal(adapter(whole.out)[key], expected[key]) for key in expected)
