"""The real model, SmolLM2-135M-Instruct, on rows that a CPU trains within a second. Each file here is a theme."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec
from common.run.training import train
from tests.conftest import TRAIN
from tests.run.test_training import prepare

STEPS = 30
SYSTEM = {"role": "system", "content": "Answer in JSON."}  # shorter than the one that the template would write
SHORT = 72  # characters of question and answer: about 45 tokens with the template's


def write_short_chats(path: Path, first: int, count: int) -> str:
    """The path of a file with conversations of about 45 tokens, two to a row of 96."""
    chats = [json.loads(line)["messages"] for line in Path(TRAIN).read_text().splitlines()]
    short = [chat for chat in chats if sum(len(message["content"]) for message in chat) <= SHORT]
    lines = [json.dumps({"messages": [SYSTEM, *chat]}) for chat in short[first : first + count]]
    assert len(lines) == count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def real_recipe(model: Path, folder: Path, bits: int = 4, lora: LoraSpec | None = None, **train: object) -> Recipe:
    """Thirty steps of one row; ten conversations are held out. Data and output are in the folder."""
    train = {"seq_len": 96, "max_steps": STEPS, "warmup_ratio": 0.0, "sample_answers": 0} | train
    return Recipe(
        ModelSpec(str(model), bits=bits),
        DataSpec(
            write_short_chats(folder / "train.jsonl", 0, 2 * STEPS),
            eval_source=write_short_chats(folder / "held_out.jsonl", 2 * STEPS, 10),
            drift_source=None,
        ),
        lora or LoraSpec(rank=4, alpha=8),
        TrainSpec(rows_per_step=1, learning_rate=1e-3, **train),
        card_gib=None,
        out=str(folder / "run"),
    )


@pytest.fixture(scope="session")
def trained(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of thirty steps that has ended. All workers share it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each worker has a folder of its own in it
    recipe = real_recipe(real_model, shared / "real-model")
    with (shared / "real-model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (Path(recipe.out) / "report.html").exists():  # which is written last
            train(*prepare(recipe))
    return recipe
