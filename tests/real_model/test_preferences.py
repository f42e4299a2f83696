"""The real model learns to prefer one style, with the same content: DPO on pairs of the repository's own generator."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.recipe import DataSpec, PreferenceSpec
from common.run.metrics_file import read_metrics
from common.run.training import train
from tests.conftest import ROOT
from tests.real_model.conftest import SYSTEM, real_recipe
from tests.run.test_training import prepare
from tests.test_tiny import HELD_OUT_PAIRS, PAIRS, preferences

SHORT = 130  # characters of question and both answers: about 90 tokens with the template's


def write_pairs(path: Path, name: str, count: int) -> str:
    """The path of a file with the first pairs of data/tiny that are short enough for a row of 128 tokens."""
    short = [pair for pair in preferences(name) if sum(map(len, pair.values())) <= SHORT][:count]
    assert len(short) == count
    lines = [{**pair, "prompt": [SYSTEM, {"role": "user", "content": pair["prompt"]}]} for pair in short]
    lines = [line | {side: _answer(line[side]) for side in ("chosen", "rejected")} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def _answer(text: Any) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.slow  # thirty steps
def test_the_real_model_prefers_one_style_after_thirty_steps_and_drifts_little(real_model, tmp_path):
    recipe = real_recipe(real_model, tmp_path, seq_len=160)
    drift = tmp_path / "general.jsonl"
    drift.write_text("".join(line + "\n" for line in (ROOT / "data" / "general.jsonl").read_text().splitlines()[:4]))
    recipe = replace(
        recipe,
        data=DataSpec(
            write_pairs(tmp_path / "pairs.jsonl", PAIRS, 30),
            eval_source=write_pairs(tmp_path / "held_out_pairs.jsonl", HELD_OUT_PAIRS, 10),
            drift_source=str(drift),
        ),
        preference=PreferenceSpec("dpo"),
        train=replace(recipe.train, learning_rate=5e-4),
    )
    train(*prepare(recipe))
    held_out = [entry["eval_rewards/accuracies"] for entry in read_metrics(Path(recipe.out)) if "eval_loss" in entry]
    assert held_out[-1] >= 0.95  # before the first step all are ties, up to rounding
    told = json.loads((Path(recipe.out) / "run.json").read_text())["drift"]
    print(told, held_out)
    assert told["texts"] == 4 and abs(told["loss"] - told["base_loss"]) < 0.5
