"""Thirty steps: the losses are those of a plain TRL + PEFT script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.run.metrics_file import read_metrics
from tests.conftest import ROOT
from tests.real_model.conftest import STEPS
from tests.run.test_training import adapter

# TRL finds the assistant's words by marks in the template, which the model's own does not have.
ROLE = "{{ '<|im_start|>' + message['role'] + '\n' }}"
MARKED = (
    "{% for message in messages %}"
    f"{ROLE}{{% if message['role'] == 'assistant' %}}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
U = 2**-24  # half of the distance of two neighbouring fp32 numbers, relative
# A number on its way to a gradient goes through this many additions, one after the other: 30 layers, forward and
# backward, 4 products of matrices each, whose sums have 576 to 1,536 terms.
ADDITIONS = 30 * 2 * 4 * 1000


def marked_copy(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(MARKED)
    return folder


@pytest.mark.slow  # the thirty steps
def test_the_run_learns_and_moves_every_matrix(trained):
    losses = [entry["loss"] for entry in read_metrics(Path(trained.out)) if "loss" in entry]
    assert losses[0] < 5  # of a vocabulary of 49,152, ln 49,152 = 10.8: it knows its template
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    moved = [tensor for name, tensor in adapter(trained.out).items() if "lora_B" in name]
    assert len(moved) == 30 * 7
    assert all(tensor.isfinite().all() and tensor.any() for tensor in moved)


@pytest.mark.slow  # thirty steps of TRL
def test_thirty_losses_are_those_of_plain_trl_and_peft(trained, real_model, tmp_path):
    """The same rows in the same order, from the same adapter, all in fp32: sums in another order are the difference.

    Errors of roundings add up as a random walk, so a gradient is off by U * sqrt(ADDITIONS) of its norm, 3e-5. So is
    each of Adam's updates, which are as large as the learning rate in each of N numbers: after k steps the adapter is
    off by at most k * rate * sqrt(N) * 3e-5, and the loss, to first order, by that times the norm of its gradient. The
    losses themselves are off by 3e-5 of theirs. (Where a gradient is smaller than its error Adam's update may be
    anything up to the rate; but there the loss does not depend on it, to first order.)
    """
    train, lora = trained.train, trained.lora
    values = {
        "model": marked_copy(real_model, tmp_path / "model"),
        "data": trained.data.source,
        "out": tmp_path / "out",
        "rank": lora.rank,
        "alpha": lora.alpha,
        "seq-len": train.seq_len,
        "micro-batch-rows": 1,
        "accumulation": train.rows_per_step,
        "max-steps": STEPS,
        "seed": train.seed,
        "learning-rate": train.learning_rate,
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.plain_trl", "--fp32-adapters", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])["losses"]
    ours = [entry for entry in read_metrics(Path(trained.out)) if "loss" in entry]
    assert len(theirs) == len(ours) == STEPS

    relative = U * ADDITIONS**0.5
    numbers = sum(tensor.numel() for tensor in adapter(trained.out).values())
    off, allowed = [], []
    for step, (entry, loss) in enumerate(zip(ours, theirs, strict=True)):
        moved = step * train.learning_rate * numbers**0.5 * relative
        off.append(abs(entry["loss"] - loss))
        allowed.append(relative * loss + moved * entry["grad_norm"])
    print("largest difference", max(off), "of", max(allowed), "allowed;", off, allowed)
    assert all(torch.tensor(off) <= torch.tensor(allowed))
