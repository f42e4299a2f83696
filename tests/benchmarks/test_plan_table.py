"""The numbers of docs/memory.md, docs/speed.md and docs/long_rows.md are those that the planner gives today."""

import pytest

from benchmarks.plan_table import (
    activation_lines,
    beside_peers_lines,
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
    names = ("memory.md", "speed.md", "long_rows.md")
    memory, speed, long_rows = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in names)
    missing = [line for line in activation_lines() if line not in speed]
    in_memory = (*plan_lines(), *policy_lines(), *published_lines(), *smallest_lines(), *streaming_lines())
    missing += [line for line in (*in_memory, *long_row_lines()) if line not in memory]
    missing += [line for line in beside_peers_lines() if line not in long_rows]
    assert not missing, "python -m benchmarks.plan_table prints them: " + "\n".join(missing)
