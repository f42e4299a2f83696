"""The sweep over rank, alpha and learning rate: small on the small model; its table, picture and committed result."""

import copy
import json
from typing import Any

import pytest
import torch

from benchmarks import defaults
from benchmarks.defaults_report import draw, table
from benchmarks.short_run import Settings, ShortRun
from common.recipe import LoraSpec
from tests.conftest import ROOT

SMALL = ["--model", "models/tiny", "--data", "calls=data/tiny/held_out.jsonl", "--steps", "2", "--seq-len", "64"]
SMALL += ["--held-out-rows", "2", "--ranks", "4", "--alphas", "8"]
RESULT = ROOT / "benchmarks" / "results" / "defaults_smollm2_cpu.json"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The JSON of a sweep of two points, of which the second one diverges, and another seed of the first."""
    path = tmp_path_factory.mktemp("sweep") / "small.json"
    assert defaults.main([*SMALL, "--learning-rates", "0.004", "1e30", "--other-seeds", "1", "--json", str(path)]) == 0
    return path


def test_a_sweep_measures_its_grid_and_the_best_point_with_another_seed(swept):
    entries = json.loads(swept.read_text())["points"]
    assert [(entry["learning_rate"], entry["seed"]) for entry in entries] == [(0.004, 0), (1e30, 0), (0.004, 1)]
    good, diverged, other_seed = entries
    assert good["held_out_loss"] < good["before"] < 8  # log(2,048 tokens) is 7.6
    assert len(good["losses"]) == 2 and good["losses"][0] != other_seed["losses"][0]  # another first row
    assert diverged["held_out_loss"] is None and diverged["losses"] == [good["losses"][0], None]
    assert [entry["before"] is None for entry in entries] == [False, True, True]  # the base is measured once
    assert swept.with_suffix(".png").stat().st_size > 10_000


def test_a_sweep_that_goes_on_runs_what_is_missing_alone(swept, tmp_path, capsys):
    path = tmp_path / "copy.json"
    path.write_text(swept.read_text())
    before = json.loads(path.read_text())["points"]
    flags = [*SMALL, "--other-seeds", "1", "--json", str(path)]
    assert defaults.main([*flags, "--learning-rates", "0.004", "1e30"]) == 0
    assert json.loads(path.read_text())["points"] == before  # their seconds too
    assert "held-out loss" not in capsys.readouterr().out.split("| data |")[0].splitlines()[0]
    assert defaults.main([*flags, "--learning-rates", "0.004", "1e-9"]) == 0
    after = json.loads(path.read_text())
    assert after["points"][:3] == before and [e["learning_rate"] for e in after["points"][3:]] == [1e-9]
    assert after["grid_points"] == 3


@pytest.mark.slow  # 20 seconds: each process imports torch
def test_points_run_in_several_processes_as_in_one(swept, tmp_path):
    path = tmp_path / "processes.json"
    flags = [*SMALL, "--learning-rates", "0.004", "1e30", "--other-seeds", "--processes", "2", "--json", str(path)]
    assert defaults.main(flags) == 0
    alone, shared = (json.loads(p.read_text())["points"] for p in (swept, path))
    for one, other in zip(alone, shared, strict=False):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "3"], "has another sweep: steps 2, not 3"),
        (["--data", "calls=data/tiny/train.jsonl"], "has another sweep: data set 'calls' 'data/tiny/held_out.jsonl'"),
    ],
)
def test_points_of_another_sweep_are_not_mixed_in(swept, flags, message, capsys):
    before = swept.read_text()
    assert defaults.main([*SMALL, *flags, "--json", str(swept)]) == 2
    assert message in capsys.readouterr().err
    assert swept.read_text() == before


def test_a_result_is_drawn_without_training(swept, capsys):
    swept.with_suffix(".png").unlink()
    assert defaults.main(["--draw", str(swept)]) == 0
    printed = capsys.readouterr().out
    assert "all 2 points of the grid" in printed
    assert "| calls | 4 | 8 | 0.004 | 0.032 |" in printed
    assert swept.with_suffix(".png").exists()


def test_micro_batches_give_the_loss_and_the_gradient_of_the_whole_step():
    settings = Settings("models/tiny", 2, 4, 64, 2)
    found = []
    for rows in (4, 1):
        run = ShortRun(settings, "data/tiny/held_out.jsonl", LoraSpec(4, 8), 1e-3, seed=0)
        assert run.micro_batch_rows == 4  # 256 tokens fit a CPU's micro-batch
        run.micro_batch_rows = rows
        loss = run._backward([0, 1, 2, 3])
        gradients = [p.grad.flatten() for name, p in run.model.named_parameters() if "lora_B" in name]
        found.append((loss, torch.cat(gradients)))
    (whole, whole_gradient), (split, split_gradient) = found
    assert split == pytest.approx(whole, rel=2**-8)  # bf16 has 8 bits
    assert torch.nn.functional.cosine_similarity(whole_gradient, split_gradient, 0) > 0.999
    assert split_gradient.norm() == pytest.approx(whole_gradient.norm().item(), rel=2**-6)


def entry(rate: float, loss: float | None, **values: Any) -> dict[str, Any]:
    common = {"data": "chats", "rank": 8, "alpha": 16.0, "seed": 0, "before": None, "losses": [2.0], "seconds": 1.0}
    return common | {"learning_rate": rate, "held_out_loss": loss} | values


def result(*entries: dict[str, Any]) -> dict[str, Any]:
    settings = {"model": "a/b", "steps": 5, "rows_per_step": 1, "seq_len": 32, "held_out_rows": 4}
    versions = {"torch": "2.13.0"}
    return {
        "settings": settings,
        "data": {"chats": "c.jsonl"},
        "points": list(entries),
        "machine": "CPU",
        "versions": versions,
        "date": "2026-11-27",
        "grid_points": 4,
    }


def test_the_table_has_the_best_rate_its_neighbours_and_the_spread_of_the_seeds():
    points = [entry(1e-3, 2.0, before=3.0), entry(2e-3, 1.5), entry(4e-3, None), entry(8e-3, 1.9, alpha=32.0)]
    seeds = [entry(2e-3, 1.53, seed=1), entry(2e-3, 1.46, seed=2)]
    text = table(result(*points, *seeds))
    assert "| chats | 8 | 16 | 0.002 | 0.032 | 1.5000 | 2.0000 | diverged |" in text
    assert "| chats | 8 | 32 | 0.008 | 0.256 | 1.9000 | – | – |" in text  # the grid ends there
    assert "chats: the base has 3.0000; the best point, rank 8, alpha 16, learning rate 0.002," in text
    assert "has 1.5000, 1.5300, 1.4600 with 3 seeds: a spread of 0.0700." in text
    assert "all 4 points of the grid" in text
    assert "Short runs favour large learning rates" in text


def test_the_table_says_that_a_sweep_is_not_finished():
    text = table(result(entry(1e-3, None)))
    assert "1 of 4 points of the grid so far" in text
    assert "| chats | 8 | 16 | – | – | diverged at every rate | – | – |" in text
    assert "every point diverged" in text
    assert "other seeds have not run" in table(result(entry(1e-3, 2.0)))


def test_a_point_that_diverged_can_be_drawn(tmp_path):
    for points in ([entry(1e-3, None)], [entry(1e-3, 0.1, before=3.0), entry(2e-3, 0.9), entry(4e-3, None)]):
        path = tmp_path / "picture.png"
        draw(result(*points), path)
        assert path.stat().st_size > 10_000
        path.unlink()


def test_the_page_shows_the_committed_result():
    page = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
    committed = json.loads(RESULT.read_text())
    assert table(committed) in page
    assert RESULT.with_suffix(".png").exists()
    changed = copy.deepcopy(committed)
    for point in changed["points"]:
        point["held_out_loss"] = 9.0
    assert table(changed) not in page
