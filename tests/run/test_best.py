"""What keep="best" leaves and when patience ends a run, on runs whose held-out loss rises, also killed and resumed."""

import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.recipe import DataSpec, LoraSpec, Recipe, UserError
from common.run.best import HeldOutDecisions, best_first, checkpoint_to_keep, held_out_losses, is_out_of_patience
from common.run.checkpoints import list_checkpoints
from common.run.metrics_file import read_metrics
from common.run.training import train
from tests.child_processes import ended
from tests.conftest import TRAIN
from tests.run.test_faults import forked
from tests.run.test_training import adapter, prepare

NAN = float("nan")


@pytest.fixture
def rising(recipe, tmp_path) -> Recipe:
    """The held-out answers are spelt backwards: their loss falls while the letters are learnt, then rises."""
    lines = Path(TRAIN).read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:12]) + "\n")
    held_out = [json.loads(line) for line in lines[100:112]]
    for row in held_out:
        row["messages"][1]["content"] = row["messages"][1]["content"][::-1]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, held_out)) + "\n")
    values = {"max_steps": 24, "learning_rate": 3e-2, "eval_every": 2, "save_every": 5, "lr_schedule": "constant"}
    data = DataSpec(str(tmp_path / "few.jsonl"), eval_source=str(tmp_path / "other.jsonl"), drift_source=None)
    return replace(recipe, data=data, train=replace(recipe.train, keep="best", **values))


def at(recipe: Recipe, folder: Path, **values: object) -> Recipe:
    return replace(recipe, out=str(folder), train=replace(recipe.train, **values))


def losses_of(folder: str | Path) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in read_metrics(Path(folder)) if "eval_loss" in entry}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_adapter_with_the_lowest_held_out_loss_is_left(rising, tmp_path, capsys):
    metrics = train(*prepare(rising))
    said, losses = capsys.readouterr().out, losses_of(rising.out)
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert 0 < best < 20 and losses[24] > 1.01 * losses[best]  # or this run shows nothing
    assert metrics["kept_step"] == best and metrics["steps"] == 24
    assert (metrics["eval_loss"], metrics["last_eval_loss"]) == (losses[best], losses[24])
    assert f"kept: the adapter of step {best}, held-out loss {losses[best]:.4f} (after the last step, 24, it" in said
    assert "was lowest at step" not in said.split("kept:")[1]
    run = json.loads((Path(rising.out) / "run.json").read_text())
    assert run["metrics"]["kept_step"] == best
    assert f"the step that is kept, {best} of 24" in (Path(rising.out) / "report.html").read_text()
    names = [path.name for path in list_checkpoints(Path(rising.out) / "checkpoints")]
    assert names == [f"checkpoint-{step}" for step in sorted({24, 20, best}, reverse=True)]
    # Trained no further than that step, the adapter is the same.
    short = at(rising, tmp_path / "short", max_steps=best, keep="last")
    train(*prepare(short))
    assert equal(adapter(rising.out), adapter(short.out))
    assert not equal(adapter(rising.out), adapter(Path(rising.out) / "checkpoints" / "checkpoint-24"))


def test_the_last_step_is_left_by_default_and_the_other_choice_is_named(rising, capsys):
    rising = replace(rising, train=replace(rising.train, keep="last"))
    metrics = train(*prepare(rising))
    assert metrics["kept_step"] == 24 and metrics["eval_loss"] == losses_of(rising.out)[24]
    assert equal(adapter(rising.out), adapter(Path(rising.out) / "checkpoints" / "checkpoint-24"))
    assert 'fewer epochs would do, or TrainSpec(keep="best")' in capsys.readouterr().out
    names = [path.name for path in list_checkpoints(Path(rising.out) / "checkpoints")]
    assert names == ["checkpoint-24", "checkpoint-20"]


def test_patience_ends_the_run_and_a_resume_of_it_trains_nothing(rising, capsys):
    rising = replace(rising, train=replace(rising.train, patience=2))
    metrics = train(*prepare(rising))
    said, losses = capsys.readouterr().out, losses_of(rising.out)
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert metrics["steps"] == best + 4 < 24 and metrics["kept_step"] == best
    assert f"stopping after step {best + 4}: the last 2 evaluations did not lower the held-out loss" in said
    left = adapter(rising.out)
    again = train(*prepare(replace(rising, existing_run="resume")))
    assert "the run had ended" in capsys.readouterr().out
    assert equal(adapter(rising.out), left) and again["kept_step"] == best and again["steps"] == best + 4


def test_patience_without_keep_leaves_the_step_at_which_it_ended(rising):
    rising = replace(rising, train=replace(rising.train, keep="last", patience=1))
    metrics = train(*prepare(rising))
    assert metrics["kept_step"] == metrics["steps"] < 24
    assert equal(adapter(rising.out), adapter(list_checkpoints(Path(rising.out) / "checkpoints")[0]))


def kill_and_resume(recipe: Recipe, kills: int, folder: Path) -> None:
    started = time.monotonic()
    assert ended(forked(at(recipe, folder / "whole"), folder / "whole.log")) == 0
    seconds = time.monotonic() - started
    expected, whole = adapter(folder / "whole"), json.loads((folder / "whole" / "run.json").read_text())
    dice = random.Random(1)
    for number in range(kills):
        broken, log = at(recipe, folder / str(number)), folder / f"{number}.log"
        child = forked(broken, log)
        time.sleep(dice.uniform(0.2, 0.9) * seconds)
        os.kill(child, signal.SIGKILL)
        ended(child)
        assert ended(forked(broken, log, "--resume")) == 0, log.read_text()
        run = json.loads((Path(broken.out) / "run.json").read_text())
        assert run["metrics"]["kept_step"] == whole["metrics"]["kept_step"]
        assert equal(adapter(broken.out), expected)
        assert losses_of(broken.out) == losses_of(folder / "whole")


def test_a_killed_run_leaves_the_same_best(rising, tmp_path):
    kill_and_resume(rising, 3, tmp_path)


@pytest.mark.slow  # a minute and a half
def test_killed_runs_with_patience_leave_the_same_best(rising, tmp_path):
    kill_and_resume(replace(rising, train=replace(rising.train, patience=3)), 8, tmp_path)


def test_a_best_that_is_damaged_gives_way_to_the_next_and_is_named(rising, capsys):
    train(*prepare(rising))
    checkpoints, losses = Path(rising.out) / "checkpoints", losses_of(rising.out)
    best = best_first(held_out_losses(read_metrics(Path(rising.out))))[0]
    with (checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"damage")
    capsys.readouterr()
    metrics = train(*prepare(replace(rising, existing_run="resume")))
    assert f"warning: step {best} had the held-out loss {losses[best]:.4f}, and " in capsys.readouterr().out
    assert metrics["kept_step"] in (20, 24)


def test_without_held_out_rows_it_is_refused_before_training(rising):
    for values in ({}, {"keep": "last", "patience": 3}):
        recipe = replace(rising, data=DataSpec(rising.data.source, eval_rows=0, drift_source=None))
        with pytest.raises(UserError, match="go by the held-out loss, and no rows are held out"):
            train(*prepare(at(recipe, Path(rising.out), **values)))
    assert not (Path(rising.out) / "checkpoints").exists()


@pytest.mark.parametrize(
    ("losses", "order", "patience_out"),
    [
        ({10: 2.0, 20: 1.0, 30: 1.5, 40: 1.2}, [20, 40, 30, 10], 2),
        ({10: 1.0, 20: 1.0}, [10, 20], 1),
        ({10: 1.0, 20: NAN, 30: NAN}, [10], 2),
        ({10: NAN, 20: NAN}, [], 2),
        ({10: 1.0}, [10], 0),
        ({}, [], 0),
    ],
)
def test_what_is_best_and_how_long_ago(losses, order, patience_out):
    """patience_out: the evaluations since the best."""
    entries = [{"step": 0, "eval_loss": 0.1}, *({"step": step, "eval_loss": loss} for step, loss in losses.items())]
    found = held_out_losses([*entries, {"step": 5, "loss": 0.0}])
    assert best_first(found) == order
    assert [is_out_of_patience(found, patience) for patience in (1, 2, 3)] == [patience_out >= n for n in (1, 2, 3)]
    assert not is_out_of_patience(found, None)


def test_the_disk_needs_room_for_one_checkpoint_more(rising, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2 << 20))
    rising = replace(rising, lora=LoraSpec(64, 32))
    counts = []
    for keep in ("last", "best"):
        capsys.readouterr()
        train(*prepare(at(rising, Path(rising.out + keep), keep=keep, max_steps=1)))
        counts.append(int(re.search(r"with (\d) checkpoints of", capsys.readouterr().out).group(1)))
    assert counts == [3, 4]


def test_nothing_is_decided_where_nothing_is_wanted():
    assert HeldOutDecisions("last", None).patience is None
    assert checkpoint_to_keep(Path("/nowhere"), {}, 3) is None
