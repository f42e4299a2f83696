"""What is set for the whole process is set before torch is imported, and leaves alone what a user has set."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SHOW = "import json, os, sys, common; print(json.dumps([dict(os.environ), 'torch' in sys.modules]))"
SET_HERE = {"CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "HF_HUB_DISABLE_TELEMETRY", "LOCAL_RANK"}


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
