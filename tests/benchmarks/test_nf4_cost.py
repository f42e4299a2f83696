"""What NF4 costs: the measurement, small on the small model, and the table of its committed result."""

import json

import pytest

from benchmarks import nf4_cost
from tests.conftest import ROOT

SMALL = ["--model", "models/tiny", "--data", "calls=data/tiny/held_out.jsonl", "--steps", "3", "--seq-len", "64"]
SMALL += ["--held-out-rows", "2", "--rank", "4", "--learning-rate", "0.004"]


def test_both_bases_are_measured_before_and_after_the_same_run(tmp_path, capsys):
    path = tmp_path / "cost.json"
    assert nf4_cost.main([*SMALL, "--seeds", "0", "--json", str(path)]) == 0
    first = json.loads(path.read_text())["runs"]
    (run,) = first
    losses = run["losses"]
    assert list(losses) == list(nf4_cost.CASES)
    assert losses["base_4"] != losses["base_16"]
    assert losses["base_4"] == pytest.approx(losses["base_16"], abs=0.3)
    assert losses["trained_16"] < losses["base_16"] and losses["trained_4"] < losses["base_4"]
    # Neither the fresh adapter nor that of the other run is what was measured on the 16-bit base.
    assert len({losses["trained_4_on_16"], *(losses[case] for case in ("base_16", "trained_16", "trained_4"))}) == 4
    assert losses["trained_4_on_16"] < losses["base_16"]
    assert run["held_out_tokens"] > 0
    assert 0.07 < json.loads(path.read_text())["rounding_error"]["weights"] < 0.12

    assert nf4_cost.main([*SMALL, "--seeds", "0", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["runs"] == first  # nothing ran again: its seconds are the same
    printed = capsys.readouterr().out
    assert "seeds: 1" in printed
    # NF4's 16 values for 64 normal ones, scaled to the largest of them: 9.2 %, by simulation
    assert "and normal ones by 9.20%." in printed

    assert nf4_cost.main([*SMALL, "--alpha", "8", "--json", str(path)]) == 2
    assert "has other alpha; give this result a file of its own" in capsys.readouterr().err


def test_the_page_shows_the_committed_result(capsys):
    path = ROOT / "benchmarks" / "results" / "nf4_cost_smollm2_cpu.json"
    assert nf4_cost.main(["--draw", str(path)]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
