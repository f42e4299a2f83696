"""A tracker that is not ready is refused before anything is loaded; one that fails later does not end the run."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from common.cli import run
from common.recipe import ReportTo, TrainSpec, UserError
from common.run.folder import prepare_run_folder
from common.run.metrics_file import read_metrics
from common.run.tracker_check import refuse_unready_tracker
from common.run.training import train
from tests.run.test_training import prepare

# What transformers' callback calls of wandb. It fails as the real one does, in the function that FAILS names.
WANDB = """
import os, pathlib, sys
from types import SimpleNamespace
from importlib.machinery import ModuleSpec

class UsageError(Exception):
    pass

UsageError.__module__ = "wandb.errors.errors"
run, calls, names = None, [], []

def _call(name):
    calls.append(name)
    if os.environ.get("FAILS") == name:
        raise UsageError(f"the network is down in {name}\\nand more lines")

def login(verify=True):
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline"):
        raise UsageError("No API key configured. Use `wandb login` to log in.")

def init(**named):
    global run
    names.append(named.get("name"))
    _call("init")
    folder = pathlib.Path(os.environ.get("WANDB_DIR", ".")) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "debug.log").write_text("")
    run = SimpleNamespace(summary={}, _label=lambda **_: None)

class _Config(dict):
    def update(self, *_, **__):
        _call("config")

def define_metric(*_, **__):
    pass

def log(_):
    _call("log")
    if os.environ.get("FAILS") == "second log" and calls.count("log") == 2:
        raise ConnectionError("no route to host")

config = _Config()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with a small package of that name, at the head of the path of this process and of its children."""
    site = tmp_path / "site"
    for name, text in {"__init__": WANDB, "sdk/__init__": "", "sdk/lib/__init__": ""}.items():
        (site / "wandb" / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (site / "wandb" / f"{name}.py").write_text(text)
    (site / "wandb" / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("WANDB_DIR", "")  # so that what the run sets is taken back
    for name in ("WANDB_DIR", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def reporting(recipe, tracker="wandb"):
    return replace(recipe, train=replace(recipe.train, report_to=tracker))


def test_wandb_without_a_key_is_one_line_before_anything_is_loaded(recipe, wandb, capsys):
    loaded = []
    assert run(lambda recipe: loaded.append(1), reporting(recipe), []) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines() == [error] and not loaded
    assert "No API key configured" in error and "wandb login" in error and "WANDB_MODE=offline" in error


@pytest.mark.parametrize("variable", [("WANDB_API_KEY", "x" * 40), ("WANDB_MODE", "offline")])
def test_wandb_with_a_key_or_offline_is_ready(wandb, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    refuse_unready_tracker("wandb")


def test_a_wandb_that_cannot_be_imported_is_one_line(wandb):
    (wandb / "wandb" / "__init__.py").write_text("import a_part_that_is_missing\n")
    with pytest.raises(UserError, match="wandb says: No module named 'a_part_that_is_missing'"):
        refuse_unready_tracker("wandb")


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_folder_of_files_that_has_the_name_of_a_tracker_is_no_package(tmp_path, monkeypatch, tracker):
    """As wandb leaves it in the working directory."""
    (tmp_path / tracker).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / tracker).exists())])
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=f"not installed: .venv/bin/pip install {tracker}"):
        refuse_unready_tracker(tracker)


@pytest.mark.parametrize("where", ["init", "config", "second log", None])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(recipe, wandb, monkeypatch, capsys, where):
    monkeypatch.setenv("FAILS", where or "")
    train(*prepare(reporting(recipe)))
    out, folder = capsys.readouterr().out, Path(recipe.out)
    assert out.count("warning: wandb failed (") == (where is not None)
    if where is not None:
        reason = "no route to host" if where == "second log" else f"the network is down in {where}"
        assert f"warning: wandb failed ({reason}); training goes on without it" in out
    assert (folder / "adapter_model.safetensors").exists()
    assert sum("loss" in entry for entry in read_metrics(folder)) == 3
    assert (folder / "wandb" / "debug.log").exists() == (where != "init")


def test_a_run_has_the_name_of_its_folder_at_the_tracker(recipe, wandb):
    train(*prepare(reporting(recipe)))
    assert sys.modules["wandb"].names == [Path(recipe.out).name]


def test_all_trackers_of_the_trainer_can_be_named_and_no_other():
    assert set(get_args(ReportTo)) == {"none", *INTEGRATION_TO_CALLBACK}
    with pytest.raises(UserError, match="TrainSpec.report_to is 'wanbd'; choose one of 'none', 'azure_ml', "):
        TrainSpec(seq_len=128, rows_per_step=4, learning_rate=1e-3, report_to="wanbd")


@pytest.mark.parametrize("tracker", sorted(set(get_args(ReportTo)) - {"none"}))
def test_a_tracker_that_is_not_installed_is_one_line(recipe, capsys, monkeypatch, tracker):
    """Of kubeflow, which transformers brings, it is the server that is missing."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not hasattr(finder, "find_editable")])
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError) as error:
        refuse_unready_tracker(tracker)
    said = (
        "needs to know its server: KUBEFLOW_" if tracker == "kubeflow" else "is not installed: .venv/bin/pip install "
    )
    assert f"TrainSpec.report_to is {tracker!r}, which {said}" in str(error.value) and "\n" not in str(error.value)


def test_a_tracker_that_lacks_a_part_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    (tmp_path / "trackio" / "__init__.py").write_text("import a_part_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        UserError, match="cannot be imported: No module named 'a_part_that_is_missing'. Install it anew"
    ):
        refuse_unready_tracker("trackio")


MLFLOW = """
import os
from types import SimpleNamespace

__version__, calls, run = "3.0.0", [], None
validation = SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
utils = SimpleNamespace(validation=validation)

def is_tracking_uri_set():
    return False

def set_tracking_uri(uri):
    calls.append(("uri", uri))

def active_run():
    return run

def start_run(run_name=None, nested=False):
    global run
    calls.append(("run", run_name))
    run = SimpleNamespace(info=SimpleNamespace(run_id="1"))

def end_run():
    global run
    run = None

def log_params(values, synchronous=True):
    pass

def log_metrics(metrics, step, synchronous=True):
    calls.append(("step", step, sorted(metrics)))
"""


def test_mlflow_works_by_the_same_field(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "site" / "mlflow").mkdir(parents=True)
    (tmp_path / "site" / "mlflow" / "__init__.py").write_text(MLFLOW)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that what the run sets is taken back
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    refuse_unready_tracker("mlflow")
    train(*prepare(reporting(recipe, "mlflow")))
    calls, folder = sys.modules.pop("mlflow").calls, Path(recipe.out)
    assert calls[:2] == [("uri", f"sqlite:///{folder}/mlflow/mlflow.db"), ("run", folder.name)]
    assert sum("loss" in call[-1] for call in calls if call[0] == "step") == 3
    assert "warning: mlflow" not in capsys.readouterr().out


def test_a_tracker_hears_of_the_trainers_start_although_it_is_made_later(recipe, tmp_path, monkeypatch):
    """codecarbon's and azure_ml's callbacks begin there."""
    (tmp_path / "site" / "codecarbon").mkdir(parents=True)
    (tmp_path / "site" / "codecarbon" / "__init__.py").write_text(
        "calls = []\n"
        "class EmissionsTracker:\n"
        "    def __init__(self, output_dir): calls.append('made')\n"
        "    def start(self): calls.append('start')\n"
        "    def stop(self): calls.append('stop')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    train(*prepare(reporting(recipe, "codecarbon")))
    assert sys.modules.pop("codecarbon").calls == ["made", "start", "stop"]


def test_a_folder_with_the_files_of_trackers_is_a_run_that_overwrite_empties(tmp_path):
    for name in ("wandb", "trackio", "tensorboard", "mlflow", "swanlog"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="already holds a run"):
        prepare_run_folder(str(tmp_path), "refuse")
    prepare_run_folder(str(tmp_path), "resume")
    prepare_run_folder(str(tmp_path), "overwrite")
    assert not {"wandb", "trackio", "tensorboard", "mlflow", "swanlog"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="No API key"):
        refuse_unready_tracker("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    refuse_unready_tracker("wandb")
