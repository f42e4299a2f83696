"""Runs on a disk that fills: a tmpfs of the run's own process."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from common.machine.launch import ERROR_STATUS, ONE_SIGNAL_SECONDS
from common.recipe import LoraSpec, Recipe
from common.run import final_save
from common.run.metrics_file import read_metrics
from common.run.training import train
from tests.child_processes import ended
from tests.run.test_faults import forked
from tests.run.test_training import adapter, prepare
from tests.small_disk import NO_MOUNT, on_small_disk, seen_from_outside

MIB = 1 << 20
AtStep = dict[int, Callable[[Path], object]]


def fill(disk: Path) -> None:
    """Leaves no byte free."""
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


def make_room(disk: Path) -> None:
    (disk / "filler").unlink()


@pytest.fixture
def start_run(recipe, tmp_path):
    """start_run(at_step, wait=..., after=..., **changes): the process of a run whose disk has 4 MiB, and its log.

    at_step: what happens to the disk after an optimizer step. after: what is done in the same process at its end.
    """
    disk, log = tmp_path / "disk", tmp_path / "log"

    def start(at_step: AtStep, wait: float, after: Callable[[Path], None] = lambda _: None, **changes):
        def story(recipe: Recipe) -> None:
            prepared, steps = prepare(recipe), 0

            def hook(*_: object) -> None:
                nonlocal steps
                steps += 1
                at_step.get(steps, lambda _: None)(disk)

            register_optimizer_step_post_hook(hook)
            final_save.WAIT_SECONDS, final_save.LOOK_EVERY_SECONDS = wait, 0.05
            try:
                train(*prepared)
            finally:
                after(disk)

        changed = replace(recipe, out=str(disk / "run"), **changes)
        changed = replace(changed, train=replace(changed.train, sample_answers=0))  # they would take most of the time
        return forked(changed, log, before=on_small_disk(disk, 4 * MIB), story=story), log

    return start


def end_of(child: int) -> int:
    status = ended(child)
    if status == NO_MOUNT:
        pytest.skip("this system lets nobody mount")
    return status


def copy_to(folder: Path) -> Callable[[Path], None]:
    """Copies the disk's run to where it stays when the process has ended."""
    return lambda disk: os.system(f"cp -r {disk}/run {folder}")


def says(log: Path, text: str, child: int) -> bool:
    """Waits until the log holds the text. False when the process has ended without it, or after a minute."""
    deadline = time.monotonic() + 60
    while not log.exists() or text not in log.read_text():
        if time.monotonic() > deadline or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.05)
    return True


def test_a_disk_that_is_full_for_some_steps_costs_no_line_of_the_metrics(start_run, recipe, tmp_path):
    train_spec = replace(recipe.train, max_steps=40, save_every=20)  # 40 lines: three blocks of 4 KiB
    child, log = start_run({2: fill, 35: make_room}, 5, copy_to(tmp_path / "kept"), train=train_spec)
    assert end_of(child) == 0, log.read_text()
    out = log.read_text()
    assert out.count("metrics.jsonl cannot be written (No space left on device); training goes on") == 1, out
    assert "checkpoint-20 cannot be written" in out and "Traceback" not in out
    kept = tmp_path / "kept"
    assert [e["step"] for e in read_metrics(kept) if "loss" in e] == list(range(1, 41))
    assert all(json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines())
    assert (kept / "checkpoints" / "checkpoint-40").is_dir()


def test_the_end_of_a_run_waits_for_room(start_run, recipe, tmp_path):
    """No checkpoint fits either: what was trained is in memory only."""
    child, log = start_run({2: fill}, 60, copy_to(tmp_path / "kept"))
    if says(log, "What was trained is in memory only", child):
        (seen_from_outside(child, tmp_path / "disk") / "filler").unlink()
    assert end_of(child) == 0, log.read_text()
    out = log.read_text()
    assert "MiB are needed, 0.0 MiB are free" in out and "Traceback" not in out
    quick = replace(recipe, out=str(tmp_path / "free"), train=replace(recipe.train, sample_answers=0))
    train(*prepare(quick))
    same, free = adapter(tmp_path / "kept"), adapter(tmp_path / "free")
    assert all(torch.equal(same[name], free[name]) for name in free)
    names = {path.name for path in (tmp_path / "kept").iterdir()} - {".lock"}  # it was copied while the run held it
    assert names == {path.name for path in (tmp_path / "free").iterdir()}


def test_a_second_signal_ends_the_waiting(start_run):
    """The first one waits as well: nothing else holds what was trained."""
    child, log = start_run({2: fill}, 60)
    if says(log, "What was trained is in memory only", child):
        os.kill(child, signal.SIGTERM)
        says(log, "stopping when the files of the run are written; once more stops at once", child)
        time.sleep(2 * ONE_SIGNAL_SECONDS)
        os.kill(child, signal.SIGTERM)
    assert end_of(child) == 130, log.read_text()
    assert log.read_text().endswith("stopped\n")


def test_what_was_trained_goes_to_the_other_folder_that_the_recipe_names(start_run, tmp_path):
    other = tmp_path / "other" / "run"
    child, log = start_run({2: fill}, 60, fallback_out=str(other))
    assert end_of(child) == 0, log.read_text()
    out = log.read_text()
    assert f"What was trained is in {other} instead" in out
    assert f"adapter, tokenizer, run.json, metrics.jsonl, loss.png and README.md are in {other}" in out
    names = {path.name for path in other.iterdir()}
    assert {"adapter_model.safetensors", "run.json", "report.html", "tokenizer.json", "metrics.jsonl"} <= names
    assert [e["step"] for e in read_metrics(other) if "loss" in e] == [1, 2, 3]


@pytest.mark.parametrize(
    "save_every, remedy",
    [
        (1, "go on from checkpoint-1: ARGS=--resume"),
        pytest.param(100, "there is no checkpoint", marks=pytest.mark.slow),
    ],
)
def test_without_room_the_run_ends_with_a_line_that_names_what_is_left(start_run, recipe, save_every, remedy):
    child, log = start_run({2: fill}, 0.2, train=replace(recipe.train, save_every=save_every))
    assert end_of(child) == ERROR_STATUS, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: ") and "run cannot be written: No space left on device" in last, log.read_text()
    assert remedy in last and "Traceback" not in log.read_text()


def test_a_disk_too_small_for_the_adapter_is_refused_before_the_first_step(start_run, recipe, tmp_path):
    def full_at_start() -> None:
        on_small_disk(tmp_path / "disk", 4 * MIB)()
        fill(tmp_path / "disk")
        os.truncate(tmp_path / "disk" / "filler", 4 * MIB - (200 << 10))

    log, run = tmp_path / "log", replace(recipe, out=str(tmp_path / "disk" / "run"))
    status = end_of(forked(run, log, before=full_at_start))
    assert status == ERROR_STATUS, log.read_text()
    assert "are free there; make room, or choose another folder: OUT=..." in log.read_text()
    assert "step 1/" not in log.read_text()


def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_first_step(start_run):
    """Rank 40: the adapter has 0.3 MiB, a checkpoint three times that, and there are three of them."""
    child, log = start_run({}, 5, lora=LoraSpec(40, 32))
    assert end_of(child) == 0, log.read_text()
    out = log.read_text()
    assert "the run goes on without the checkpoints that do not fit" in out.split("step 0:")[0], out
