"""A run that was interrupted ends where the run ends that was not."""

from dataclasses import replace

import pytest
import torch

from common.recipe import LoraSpec
from common.run.metrics_file import read_metrics
from common.run.trainer import Trainer
from common.run.training import train
from tests.real_model.conftest import real_recipe
from tests.run.test_training import adapter, interrupt_at, prepare


@pytest.mark.slow  # three loads, nine steps
def test_a_resumed_run_ends_at_the_same_adapter_bit_for_bit(real_model, tmp_path, monkeypatch):
    """With LoRA dropout, whose masks the random state of the checkpoint draws again."""
    lora = LoraSpec(rank=4, alpha=8, dropout=0.1)
    recipe = real_recipe(real_model, tmp_path, lora=lora, seq_len=48, max_steps=4, save_every=2)
    recipe = replace(recipe, data=replace(recipe.data, eval_source=None, eval_rows=0))
    train(*prepare(replace(recipe, out=str(tmp_path / "whole"))))
    broken = replace(recipe, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log", interrupt_at(3))
        with pytest.raises(KeyboardInterrupt):
            train(*prepare(broken))
    train(*prepare(replace(broken, existing_run="resume")))
    assert [e["step"] for e in read_metrics(tmp_path / "broken") if "loss" in e] == [1, 2, 3, 4]
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
