"""A model of the hub, small enough for a CPU, goes through a recipe's story. Its template writes two BOS tokens."""

from pathlib import Path

import pytest
import torch

from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run.metrics_file import read_metrics
from common.run.training import train
from tests.conftest import TRAIN
from tests.run.test_training import adapter, prepare


@pytest.mark.slow
def test_smollm2_is_trained(real_model, tmp_path):
    lines = Path(TRAIN).read_text().splitlines()[:40]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    recipe = Recipe(
        ModelSpec(str(real_model)),
        DataSpec(str(tmp_path / "chats.jsonl"), eval_rows=0, drift_source=None),
        LoraSpec(rank=4, alpha=8),
        TrainSpec(seq_len=128, rows_per_step=2, learning_rate=1e-3, max_steps=2),
        card_gib=None,
        out=str(tmp_path / "run"),
    )
    train(*prepare(recipe))
    first, second = (entry["loss"] for entry in read_metrics(tmp_path / "run"))
    assert second < first < 5  # of a vocabulary of 49,152, ln 49,152 = 10.8: it knows its template
    moved = [tensor for name, tensor in adapter(tmp_path / "run").items() if "lora_B" in name]
    assert len(moved) == 30 * 7
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in moved)
