"""The counted peak of a DPO step beside TRL's: the committed result, the page, and the count made anew."""

import json
import subprocess
import sys

import pytest

from benchmarks.preference_memory import ANSWER_TOKENS, table_lines
from recipes.llama3_8b_dpo import RECIPE
from tests.conftest import ROOT

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "preference_memory.json").read_text(encoding="utf-8"))


def test_the_page_shows_the_committed_result():
    page = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    assert [line for line in table_lines(RESULTS) if line not in page] == []


def test_the_result_is_of_the_recipe_at_full_depth():
    assert (RESULTS["model"], RESULTS["layers"]) == (RECIPE.model.name, None)
    assert 2 * RESULTS["answer_tokens"] == 2 * ANSWER_TOKENS == RECIPE.train.seq_len


def count(folder, *arguments: str) -> dict:
    """In a process of its own: it changes what libraries see of autocast."""
    out = folder / "result.json"
    command = [sys.executable, "-m", "benchmarks.preference_memory", *arguments, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow  # 45 s
def test_the_counts_are_the_committed_ones(tmp_path):
    # Else `python -m benchmarks.preference_memory` writes the result anew.
    found = count(tmp_path)
    assert [(row["stack"], row["predicted_bytes"]) for row in found["rows"]] == [
        (row["stack"], row["predicted_bytes"]) for row in RESULTS["rows"]
    ]
