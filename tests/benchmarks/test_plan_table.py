"""The numbers of docs/memory.md and docs/speed.md are those that the planner gives today."""

import pytest

from benchmarks.plan_table import (
    activation_lines,
    long_row_lines,
    plan_lines,
    policy_lines,
    published_lines,
    smallest_lines,
    streaming_lines,
)
from tests.conftest import ROOT


@pytest.mark.slow
def test_the_tables_of_plans_are_what_the_planner_says():
    memory, speed = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("memory.md", "speed.md"))
    missing = [line for line in activation_lines() if line not in speed]
    in_memory = (*plan_lines(), *policy_lines(), *published_lines(), *smallest_lines(), *streaming_lines())
    missing += [line for line in (*in_memory, *long_row_lines()) if line not in memory]
    assert not missing, "python -m benchmarks.plan_table prints them: " + "\n".join(missing)
