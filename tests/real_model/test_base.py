"""The base, before anything is trained: it is the one that stock transformers and bitsandbytes load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.run.trainer_config import build_trainer
from common.tokens.labels import IGNORED
from tests.real_model.conftest import real_recipe
from tests.run.test_training import prepare

TOLERANCE = 1e-4  # nats: sums in fp32 in another order


def stock_model(folder: Path, bits: int) -> Any:
    """The base in fp32 as the libraries' documentation loads it."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantisation = {"quantization_config": nf4} if bits == 4 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantisation).eval()
    for module in model.modules():  # on some CPUs eval mode would round what it computes to bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def stock_loss(model: Any, rows: Any) -> float:
    """Mean loss of the trained tokens, in nats. Each example of the packed rows goes through the model alone."""
    total, count = 0.0, 0
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            ids, labels = (torch.tensor([row[name][start : start + length]]) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
            count += int((labels[0, 1:] != IGNORED).sum())
            start += length
    return total / count


@pytest.mark.slow  # loads the model four times
def test_the_held_out_loss_is_that_of_stock_transformers_and_bitsandbytes(real_model, tmp_path):
    ours, theirs = {}, {}
    for bits in (4, 16):
        recipe = real_recipe(real_model, tmp_path / str(bits), bits)
        model, tokenizer, rows, recipe, plan = prepare(recipe)
        assert max(len(row["seq_lengths"]) for row in rows.evaluation) == 2
        ours[bits] = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out)).evaluate()["eval_loss"]
        theirs[bits] = stock_loss(stock_model(real_model, bits), rows.evaluation)
    print("held-out loss, ours and stock:", ours, theirs)
    assert ours == pytest.approx(theirs, abs=TOLERANCE)
    assert abs(theirs[4] - theirs[16]) > 100 * TOLERANCE  # a base that was not quantised would be seen
