"""A run that has ended, for the tests of what comes after it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run.training import train
from tests.conftest import TRAIN
from tests.run.test_training import prepare


@pytest.fixture(scope="package")
def finished(small_llama, tmp_path_factory) -> Recipe:
    """A recipe whose run has ended, with its run.json."""
    recipe = Recipe(
        model=ModelSpec(str(small_llama)),
        data=DataSpec(TRAIN, eval_rows=20, drift_source=None),
        lora=LoraSpec(rank=4, alpha=8),
        train=TrainSpec(seq_len=128, rows_per_step=4, learning_rate=5e-3, max_steps=2),
        card_gib=None,
        out=str(tmp_path_factory.mktemp("finished") / "run"),
    )
    Path(recipe.out).mkdir()
    train(*prepare(recipe))
    return recipe


@pytest.fixture
def copy(finished, tmp_path) -> Recipe:
    shutil.copytree(finished.out, tmp_path / "run")
    return replace(finished, out=str(tmp_path / "run"))
