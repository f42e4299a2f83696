"""docs/reliability.md lists faults that other projects had and mended, each with the test here that would find it."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEADING = "## Faults that other projects mended"
# Project and number of each fault in the table. "zoo" is unsloth-zoo.
FAULTS = {
    *("unsloth 8261", "unsloth 6016", "unsloth 6829", "unsloth 7234", "unsloth 5967", "unsloth 6524", "unsloth 5451"),
    *("unsloth 7048", "unsloth 6531", "unsloth-zoo 942", "trl 6363", "trl 6433", "trl 6357", "trl 5305", "trl 6206"),
    *("trl 5517", "trl 3910", "axolotl 3796", "axolotl 3478", "axolotl 3756", "axolotl 3771", "axolotl 3799"),
    *("axolotl 3833", "axolotl 3638", "axolotl 3596", "transformers 43032", "peft 793", "NeMo RL 921"),
}


@cache
def table() -> list[list[str]]:
    """The cells of each row: what went wrong and where, what must hold, the tests."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    section = text.split(f"{HEADING}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]  # without the head
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named_tests() -> list[str]:
    return [name for row in table() for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", row[2])]


def test_the_table_has_every_fault_once_and_a_test_for_each():
    places = [fault for row in table() for fault in re.findall(r"\(([^()]*\d{3,}[^()]*)\)$", row[0])]
    assert sorted(fault for place in places for fault in place.split(", ")) == sorted(FAULTS)
    for row in table():
        assert len(row) == 3 and row[1]
        names = re.findall(r"`([^`]*)`", row[2])
        assert names and set(names) <= set(named_tests()), row


@pytest.mark.parametrize("name", sorted(set(named_tests())))
def test_every_named_test_is_there_to_be_collected(name):
    """A function of the module itself, whose name pytest takes for a test, and one that is not skipped for good."""
    path, function = name.split("::")
    assert Path(path).name.startswith("test_") and function.startswith("test_")
    tree = ast.parse((ROOT / path).read_text())
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(defined) == 1
    marks = [ast.unparse(mark) for mark in defined[0].decorator_list]
    assert not any(re.match(r"pytest\.mark\.(skip\b|xfail|gpu)", mark) for mark in marks)
