"""Our run against a plain TRL + PEFT script: see benchmarks/parity.py for the tolerance and its reason."""

import pytest

from benchmarks.parity import compare, same_losses


@pytest.mark.slow
def test_the_losses_are_those_of_plain_trl_and_peft():
    result = compare(steps=6, repeats=1)
    assert len(result["ours_losses"]) == 6
    assert result["ours_losses"][-1] < 0.8 * result["ours_losses"][0]  # it does learn in these steps
    assert same_losses(result), result


@pytest.mark.slow
def test_ours_is_not_slower_than_plain_trl_and_peft():
    result = compare(steps=60, repeats=3)
    assert same_losses(result), result
    assert result["speed_ratio"] >= 1, result
