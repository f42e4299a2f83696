"""make demo: the table of docs/demo.md is what the program counts."""

import re
import sys

import pytest

from benchmarks import bert_large
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    picture = tmp_path_factory.mktemp("demo") / "picture.png"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(sys, "argv", ["bert_large", "--picture", str(picture)])
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(map(str, words))))
        assert bert_large.main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    return "\n".join(lines)


def columns(text: str) -> dict[str, list[float]]:
    """Numbers of the table by the name of their line."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: [float(cell.strip("*× ")) for cell in row[1:]] for row in rows if re.match(r"[\d*]", row[-1])}


def test_the_page_shows_the_table_that_the_program_prints(printed):
    shown = [line for line in printed.splitlines() if line.startswith("|")]
    assert "\n".join(shown) in (ROOT / "docs" / "demo.md").read_text()


def test_the_kinds_add_up_to_the_peak(printed):
    table = columns(printed)
    kinds = ("model", "gradients", "optimizer", "saved activations", "working set")
    for column in (0, 1):
        assert sum(table[kind][column] for kind in kinds) == pytest.approx(table["**peak, counted**"][column], abs=0.03)


def test_the_saved_activations_are_those_of_the_formula(printed):
    """Bytes a token: 34 H + 8 I + 4 (16 + 4) in a layer that keeps them (tests/plan/test_count.py), 4 H in one that
    recomputes; what lies outside the layers is within the tolerance."""
    tokens, saved = 64 * 512, columns(printed)["saved activations"]
    kept = 24 * (34 * 1024 + 8 * 4096 + 80) * tokens / 2**30
    assert saved[0] == pytest.approx(kept, rel=0.02)
    assert saved[1] == pytest.approx(24 * 4 * 1024 * tokens / 2**30, rel=0.1)


def test_without_a_gpu_it_says_that_nothing_was_measured(printed):
    assert printed.count("not measured") == 2
    assert "torch sees no GPU here: run it on one to measure" in printed
