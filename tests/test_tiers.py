"""Tests of the CPU never see a GPU, whatever asks CUDA first."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import tiers
from tests.conftest import ROOT, pytest_configure

# A plugin that ends pytest where torch is first imported, and says what CUDA would be shown.
SPY = """
import os
import sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "bitsandbytes"):
            shown = [os.environ.get(variable) for variable in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")]
            with open(os.environ["SEEN"], "w") as seen:  # pytest has taken the standard streams
                print(name, *shown, end="", file=seen)
            os._exit(0)
sys.meta_path.insert(0, Spy())
"""


@pytest.mark.parametrize(
    ("arguments", "options", "seen"),
    [
        ([], "", "torch  1"),
        (["-m", "slow"], "-m gpu", "torch  1"),  # the command line wins
        (["-m", "gpu"], "", "torch 0,1 None"),
        ([], "-q -mgpu", "torch 0,1 None"),
    ],
)
def test_torch_is_imported_with_the_gpus_hidden_unless_the_gpu_tier_runs(tmp_path, arguments, options, seen):
    (tmp_path / "spy.py").write_text(SPY)
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", tiers._HIDDEN)}
    clean.pop("PYTEST_XDIST_WORKER", None)
    told = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1", "PYTEST_ADDOPTS": options}
    told["SEEN"] = str(tmp_path / "seen")
    command = [sys.executable, "-m", "pytest", "-p", "spy", "-p", "no:cacheprovider", "tests/test_gpu.py", *arguments]
    subprocess.run(command, env=clean | told, cwd=ROOT, capture_output=True, check=True)
    assert (tmp_path / "seen").read_text() == seen


@pytest.mark.parametrize(
    ("expression", "gpu"),
    [
        ("", False),
        ("not slow and not gpu", False),
        ("slow", False),
        ("slow or gpu", False),
        ("gpu", True),
        ("gpu and not slow", True),
    ],
)
def test_the_gpu_tier_is_what_selects_tests_of_the_gpu_alone(expression, gpu):
    assert tiers.is_gpu_tier(expression) == gpu


def test_a_gpu_tier_that_was_seen_too_late_is_refused(monkeypatch):
    """pytest reads -qm as -q -m; what knows -m alone does not."""
    assert tiers.asked_for(["-qm", "gpu"]) == ""
    monkeypatch.setenv(tiers._HIDDEN, "1")
    with pytest.raises(pytest.UsageError, match="write -m gpu as words of their own on the command line"):
        pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr="gpu")))
