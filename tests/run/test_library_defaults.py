from pathlib import Path

import torch

from common.run.trainer_config import build_trainer
from tests.run.test_training import prepare


def test_pitfall_19_adapters_stay_fp32_although_the_trainer_casts_them(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])
