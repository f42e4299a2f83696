"""The measurement of a merge's memory, on the small model."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow  # four processes that import torch
def test_merge_and_export_are_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.merge_memory", "tiny", str(tmp_path / "scratch")]
    done = subprocess.run([*command, "--json", str(tmp_path / "result.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["merge"]["said"].startswith("self-check: KL ")
    assert all(result[command]["peak_gib"] > 0 for command in ("merge", "export q8_0"))
