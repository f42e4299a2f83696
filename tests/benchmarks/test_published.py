"""The ledger against peaks that others published: the committed results, the page, and two rows counted anew."""

import ast
import json
from pathlib import Path

import pytest

from benchmarks.published import environment as environments
from benchmarks.published.__main__ import count_in_environment, main
from benchmarks.published.environment import environment
from benchmarks.published.report import bias_lines, memory_lines, speed_lines
from benchmarks.published.rows import DATA_SHEETS, ROWS
from common.recipe import UserError
from tests.conftest import ROOT
from tests.test_structure import MODULES

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "published_memory.json").read_text(encoding="utf-8"))
PEAKS = {name: result for name, result in RESULTS["rows"].items() if result["published_bytes"]}


def test_the_page_shows_the_committed_results():
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    lines = memory_lines(RESULTS) + speed_lines(RESULTS) + bias_lines(RESULTS)
    assert [line for line in lines if line not in page] == []


def test_the_results_are_those_of_the_rows():
    assert list(RESULTS["rows"]) == [row.name for row in ROWS]
    for row in ROWS:
        result = RESULTS["rows"][row.name]
        assert (result["published_bytes"], result["published_rest_bytes"]) == (row.peak_bytes, row.rest_bytes)
        assert list(result["speeds"]) == list(row.tokens_per_s)


def test_the_committed_counts_are_near_the_published_peaks():
    """README and docs/published.md say so."""
    off = {name: abs(result["predicted_bytes"] / result["published_bytes"] - 1) for name, result in PEAKS.items()}
    assert max(off.values()) < 0.004
    assert max(off[name] for name, result in PEAKS.items() if result["published_bytes"] > 15e9) < 0.00035


def test_every_gpu_with_a_speed_has_its_data_sheet():
    assert {gpu for row in ROWS for gpu in row.tokens_per_s} == set(DATA_SHEETS)


def imported_at_once(path: Path) -> set[str]:
    """Names of the modules that importing the file imports, those of `from a import b` as a and as a.b."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_ledger_needs_no_transformers():
    """It is imported beside the authors' versions, which lack what this repository's own modules import of today's."""
    seen, todo = set(), {"common.plan.ledger", "common.plan.speed", "common.plan.step"}
    while todo:
        seen.add(module := todo.pop())
        if module in MODULES:
            todo |= imported_at_once(MODULES[module]) - seen
    assert "common.plan.operators" in seen
    assert {name for name in seen if name.split(".")[0] in ("transformers", "peft", "accelerate", "trl")} == set()


def test_packages_that_cannot_be_installed_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no index can be reached
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="pip cannot install transformers==4.48.1: .*No matching distribution"):
        environment(["transformers==4.48.1"])
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_row_that_no_name_has_changes_nothing(tmp_path, capsys):
    out = tmp_path / "results.json"
    assert main(["--rows", "no such row", "--out", str(out)]) == 2
    assert "no row has 'no such row' in its name" in capsys.readouterr().err and not out.exists()


@pytest.mark.slow  # 12 s each, and the first time 5 s to install 12 and 15 MB
@pytest.mark.parametrize("name", ["Llama 1B QLoRA 2048", "Mistral 7B QLoRA x4, 2025-01"])
def test_a_published_peak_is_counted_anew(name):
    (row,) = (row for row in ROWS if row.name == name)
    try:
        environment(row.stack.packages)
    except UserError as error:
        pytest.skip(str(error))
    counted = count_in_environment(row)
    assert counted["predicted_bytes"] == pytest.approx(row.peak_bytes, rel=0.004)
    # Else `python -m benchmarks.published` writes the results of docs/published.md anew.
    assert counted["predicted_bytes"] == RESULTS["rows"][name]["predicted_bytes"]
