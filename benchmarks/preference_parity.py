"""Compares our run with one of TRL's DPOTrainer or KTOTrainer on the same examples, seed and hyperparameters.

    make parity ARGS="--loss dpo"   # or kto: tiny-dpo's model and data, 30 steps
    make parity ARGS="--loss dpo --precompute"    # TRL with its reference computed before the run too

TRL pads examples, we pack them. So examples are chosen of which a fixed number fits a packed row, and each of TRL's
batches is what our run took in that step: 8 pairs, or for KTO 8 answers. KTO's point of comparison is a mean over a
step's answers behind other prompts: TRL gives each prompt the answer before its own, we the one after it in the row, so
TRL gets the row in reverse.

Both start from the same adapter, in fp32, on the same 4-bit weights, so only the order of sums differs. How far the
losses may part is derived (allowed_difference).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results_folder import write_result
from common import REPOSITORY
from recipes.tiny_dpo import RECIPE

SEQ_LEN = {"dpo": 128, "kto": 256}
# Tokens of an example: of these two pairs, or eight answers with their prompts, fit a row, whichever they are.
FITTING = {"dpo": range(43, 65), "kto": range(29, 33)}
EXAMPLES_OF_A_ROW = {"dpo": 2, "kto": 8}
ROWS_PER_STEP = {"dpo": 4, "kto": 1}
LEARNING_RATE, BETA = 1e-3, 0.1
U = 2**-24  # half of the distance of two neighbouring fp32 numbers, relative
# A number on its way to a gradient goes through this many additions, one after the other: 4 layers, forward and
# backward, 4 products of matrices each, whose sums have 192 to 512 terms.
ADDITIONS = 4 * 2 * 4 * 350
COMPARISONS = 8  # of an optimizer step: pairs, or rated answers
ANSWER_TOKENS, TOKEN_NATS = 20, 7.0  # at most; of 1,024 tokens that are all equally likely each has 6.9

# Ours, in a process of its own. It also writes the rows of its steps, and how long the reference took.
RUN_OURS = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from common.recipe import DataSpec, PreferenceSpec
from common.run import reference, training, trainer_config
from recipes import tiny_dpo
values = json.loads(sys.argv[1])
out, recipe = Path(values["out"]), tiny_dpo.RECIPE
recipe = replace(
    recipe,
    data=DataSpec(values["data"], eval_rows=0, drift_source=None),
    preference=PreferenceSpec(values["loss"], beta=values["beta"]),
    train=replace(
        recipe.train, seq_len=values["seq_len"], rows_per_step=values["rows_per_step"], max_steps=values["steps"],
        learning_rate=values["learning_rate"], warmup_ratio=0.0, sample_answers=0,
    ),
    out=str(out), existing_run="overwrite",
)
stock, rows_of_steps, seconds = trainer_config.collate, [], []
def collate(rows, *arguments, **named):
    if values["loss"] != "kto" or "kl_reference" in rows[0]:  # the others have mismatched answers
        rows_of_steps.extend([row["input_ids"], row["seq_lengths"]] for row in rows)
    return stock(rows, *arguments, **named)
trainer_config.collate, reference.REFERENCES = collate, out / "references"
compute = training.with_reference
def with_reference(*arguments):
    started = time.perf_counter()
    rows = compute(*arguments)
    seconds.append(time.perf_counter() - started)
    return rows
training.with_reference = with_reference
plan = tiny_dpo.plan_for_card(recipe)
tokenizer = tiny_dpo.load_tokenizer(recipe.model)
rows = tiny_dpo.load_rows(recipe.data, tokenizer, recipe.train.seq_len, recipe.train.seed)
model = tiny_dpo.attach_lora(tiny_dpo.load_4bit(recipe.model), recipe.lora, recipe.train.seed)
tiny_dpo.checkpoint_activations(model, plan.checkpointing)
training.train(model, tokenizer, rows, recipe, plan)
parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
written = {"rows": rows_of_steps, "reference_seconds": seconds[0], "parameters": parameters}
(out / "steps.json").write_text(json.dumps(written))
"""


def write_examples(loss: str, path: Path, tokenizer: Any) -> dict[tuple[int, ...], dict[str, Any]]:
    """Writes the examples of the recipe's data that have a fitting number of tokens, as TRL reads them.

    Returns each example by the token ids of its conversation, or of a pair's two conversations, one after the other.
    """
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    example: dict[str, Any]
    lines = (REPOSITORY / RECIPE.data.source).read_text().splitlines()
    for number, pair in enumerate(map(json.loads, lines)):
        prompt = [{"role": "user", "content": pair["prompt"]}]
        answers = {name: [{"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")}
        ids = {name: tokenizer.apply_chat_template(prompt + answer)["input_ids"] for name, answer in answers.items()}
        if loss == "dpo":
            key, example = (*ids["chosen"], *ids["rejected"]), {"prompt": prompt, **answers}
        else:
            name = "chosen" if number % 2 else "rejected"
            key, example = tuple(ids[name]), {"prompt": prompt, "completion": answers[name], "label": name == "chosen"}
        if len(key) in FITTING[loss]:
            found[key] = example
    count = len(found) // EXAMPLES_OF_A_ROW[loss] * EXAMPLES_OF_A_ROW[loss]  # no row with fewer
    kept = dict(list(found.items())[:count])
    path.write_text("".join(json.dumps(example) + "\n" for example in kept.values()))
    return kept


def examples_of_row(loss: str, ids: list[int], lengths: list[int]) -> list[tuple[int, ...]]:
    """The token ids of each example of a packed row."""
    step, examples, start = 2 if loss == "dpo" else 1, [], 0
    for number in range(0, len(lengths), step):
        end = start + sum(lengths[number : number + step])
        examples.append(tuple(ids[start:end]))
        start = end
    return examples


def run(*command: str) -> str:
    """Runs Python with these arguments. Returns what it prints; raises RuntimeError with its last words."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:80]} failed: {done.stderr[-2000:]}")
    return done.stdout


def run_ours(loss: str, steps: int, folder: Path) -> dict[str, Any]:
    """Losses, norms of gradients and seconds of our run, and a file with its examples in the order that it took."""
    from transformers import AutoTokenizer

    examples = write_examples(loss, folder / "data.jsonl", AutoTokenizer.from_pretrained(RECIPE.model.name))
    values = {
        "data": str(folder / "data.jsonl"),
        "out": str(folder / "ours"),
        "loss": loss,
        "steps": steps,
        "seq_len": SEQ_LEN[loss],
        "rows_per_step": ROWS_PER_STEP[loss],
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
    }
    run("-c", RUN_OURS, json.dumps(values))
    written = json.loads((folder / "ours" / "steps.json").read_text())
    rows = [examples_of_row(loss, *row) for row in written["rows"][: steps * ROWS_PER_STEP[loss]]]
    assert all(len(row) == EXAMPLES_OF_A_ROW[loss] for row in rows)
    taken = [examples[key] for row in rows for key in (row if loss == "dpo" else row[::-1])]
    (folder / "taken.jsonl").write_text("".join(json.dumps(example) + "\n" for example in taken))
    lines = (folder / "ours" / "metrics.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in entries],
        "grad_norms": [entry["grad_norm"] for entry in entries],
        "seconds": entries[-1]["seconds"],
        "reference_seconds": written["reference_seconds"],
        "parameters": written["parameters"],
    }


def run_plain(loss: str, steps: int, folder: Path, *, precompute: bool) -> dict[str, Any]:
    """Losses and seconds of TRL's trainer, on the examples that our run took."""
    values = {
        "loss": loss,
        "model": RECIPE.model.name,
        "data": folder / "taken.jsonl",
        "out": folder / "plain",
        "rank": RECIPE.lora.rank,
        "alpha": RECIPE.lora.alpha,
        "batch": ROWS_PER_STEP[loss] * EXAMPLES_OF_A_ROW[loss],
        "max-steps": steps,
        "seed": RECIPE.train.seed,
        "learning-rate": LEARNING_RATE,
        "beta": BETA,
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    printed = run("-m", "benchmarks.plain_preferences", *flags, *(["--precompute"] if precompute else []))
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def allowed_difference(step: int, grad_norm: float, parameters: int) -> float:
    """How far the losses of a step may part, with fp32 sums in another order. step: from 0 on.

    Errors of roundings add up as a random walk. In a forward pass a number is off by U * sqrt(ADDITIONS / 2), 4e-6, of
    its size, and so is the log-likelihood of a token, of TOKEN_NATS: independently of other tokens. The loss of a pair
    depends on four log-likelihoods of answers; that of a rated answer on two, and on KTO's point of comparison, which
    is a mean of as many again. It changes by at most beta with each, and is a mean over COMPARISONS. Both sides round.

    A gradient is off by U * sqrt(ADDITIONS) of its norm, 6e-6. So is each of Adam's updates, which are as large as the
    learning rate in each number: after k steps the adapter is off by at most k * rate * sqrt(parameters) * 6e-6, and
    the loss, to first order, by that times the norm of its gradient. (Where a gradient is smaller than its error Adam's
    update may be anything up to the rate; but there the loss does not depend on it, to first order.)
    """
    forward = BETA * (4 * ANSWER_TOKENS / COMPARISONS) ** 0.5 * TOKEN_NATS * U * (ADDITIONS / 2) ** 0.5
    moved = step * LEARNING_RATE * parameters**0.5 * U * ADDITIONS**0.5
    return 2**0.5 * forward + moved * grad_norm


def compare(loss: str, steps: int, repeats: int = 1, *, precompute: bool = False) -> dict[str, Any]:
    """Runs both in turn, `repeats` times. Returns the losses of the first pair of runs, and medians of the times."""
    pairs = []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            ours = run_ours(loss, steps, Path(folder))
            plain = run_plain(loss, steps, Path(folder), precompute=precompute)
            run_json = json.loads((Path(folder) / "ours" / "run.json").read_text())
        pairs.append((ours, plain))
        print(f"pair {repeat + 1}: ours {in_seconds(ours)}, TRL {in_seconds(plain)}", flush=True)
    ours, plain = pairs[0]
    allowed = [allowed_difference(step, norm, ours["parameters"]) for step, norm in enumerate(ours["grad_norms"])]
    differences = [abs(a - b) for a, b in zip(ours["losses"], plain["losses"], strict=True)]
    return {
        "loss": loss,
        "steps": steps,
        "precompute": precompute,
        "machine": run_json["machine"],
        "versions": run_json["versions"],
        **{
            f"{who}_{name}": statistics.median(pair[side][name] for pair in pairs)
            for side, who in enumerate(("ours", "plain"))
            for name in ("seconds", "reference_seconds")
        },
        "differences": differences,
        "allowed": allowed,
        "ours_losses": ours["losses"],
        "plain_losses": plain["losses"],
    }


def in_seconds(times: dict[str, Any]) -> str:
    return f"{times['seconds']:.1f} s + {times['reference_seconds']:.1f} s for the reference before the run"


def same_losses(result: dict[str, Any]) -> bool:
    return all(off <= limit for off, limit in zip(result["differences"], result["allowed"], strict=True))


def main(loss: str, steps: int, repeats: int, *, precompute: bool, json_path: Path | None) -> int:
    result = compare(loss, steps, repeats, precompute=precompute)
    shares = [off / limit for off, limit in zip(result["differences"], result["allowed"], strict=True)]
    times = {
        who: {name: result[f"{who}_{name}"] for name in ("seconds", "reference_seconds")} for who in ("ours", "plain")
    }
    print(
        f"losses: {result['ours_losses'][0]:.4f} to {result['ours_losses'][-1]:.4f}, of TRL "
        f"{result['plain_losses'][0]:.4f} to {result['plain_losses'][-1]:.4f}; the first differs by "
        f"{result['differences'][0]:.1e}, the worst of {steps} by {max(result['differences']):.1e}, at most "
        f"{max(shares):.0%} of what is allowed ({result['allowed'][0]:.0e} to {result['allowed'][-1]:.0e})\n"
        f"time:   ours {in_seconds(times['ours'])}, TRL's trainer {in_seconds(times['plain'])}"
    )
    if json_path:
        write_result(result, json_path)
    return 0 if same_losses(result) else 1
