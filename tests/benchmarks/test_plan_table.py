"""The numbers of docs/memory.md and docs/speed.md are those that the planner gives today."""

import pytest

from benchmarks.plan_table import activation_lines, plan_lines, policy_lines, published_lines
from tests.conftest import ROOT


@pytest.mark.slow
def test_the_tables_in_the_pages_are_what_the_planner_says():
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("memory.md", "speed.md"))
    lines = [*activation_lines(), *plan_lines(), *policy_lines(), *published_lines()]
    missing = [line for line in lines if line not in pages]
    assert not missing, "python -m benchmarks.plan_table prints them: " + "\n".join(missing)
