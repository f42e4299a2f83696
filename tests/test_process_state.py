"""What is set for the whole process is set before torch is imported, and leaves alone what a user has set."""

import json
import os
import subprocess
import sys

import pytest

from common.cpu_quota import available_cpus
from tests.conftest import ROOT

SHOW = "import json, os, sys, common; print(json.dumps([dict(os.environ), 'torch' in sys.modules]))"
SET_HERE = {"CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "HF_HUB_DISABLE_TELEMETRY", "LOCAL_RANK"}
SET_HERE |= {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}


def environment_after_import(**variables: str) -> tuple[dict[str, str], bool]:
    clean = {name: value for name, value in os.environ.items() if name not in SET_HERE}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=clean | variables, cwd=ROOT, capture_output=True, text=True, check=True
    )
    environment, has_torch = json.loads(done.stdout)
    return environment, has_torch


def test_importing_common_sets_the_environment_and_does_not_import_torch():
    environment, has_torch = environment_after_import()
    assert not has_torch
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_variable_that_is_set_stays_as_it_is():
    environment, _ = environment_after_import(CUBLAS_WORKSPACE_CONFIG=":16:8", CUDA_VISIBLE_DEVICES="3")
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(("variables", "visible"), [({}, "0"), ({"LOCAL_RANK": "1"}, None)])
def test_only_a_process_of_torchrun_sees_all_gpus(variables, visible):
    assert environment_after_import(**variables)[0].get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize(
    ("variables", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_as_the_user_says_or_without_blocking_a_core(variables, spins):
    assert environment_after_import(**variables)[0].get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(
    ("told", "each"),
    [({}, str(max(1, available_cpus() // 2))), ({"OMP_NUM_THREADS": "7"}, "7")],
    ids=["not told", "told"],
)
def test_the_processes_of_a_run_share_the_cpus_unless_told(told, each):
    code = "import common, os; from common.process_state import prepare_launcher; prepare_launcher(2); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(os.environ['OMP_NUM_THREADS'])"],
        env={name: value for name, value in os.environ.items() if name not in SET_HERE} | told,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == each, done.stderr
