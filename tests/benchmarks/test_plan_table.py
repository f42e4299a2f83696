"""The README's numbers are those that the planner gives today."""

import pytest

from benchmarks.plan_table import activation_lines, plan_lines, policy_lines, published_lines
from tests.conftest import ROOT


@pytest.mark.slow
def test_the_table_in_the_readme_is_what_the_planner_says():
    readme = (ROOT / "README.md").read_text()
    lines = [*activation_lines(), *plan_lines(), *policy_lines(), *published_lines()]
    missing = [line for line in lines if line not in readme]
    assert not missing, "python -m benchmarks.plan_table prints them: " + "\n".join(missing)
