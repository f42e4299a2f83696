"""Whether a run may go on from a checkpoint: what the checkpoint belongs to, beside what would go on with it."""

import dataclasses
import hashlib
from importlib.metadata import version
from typing import Any

from datasets import Dataset

from common.data.rows import Rows
from common.recipe import Recipe, UserError

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")
# Of a recipe: what may change between two parts of a run, because the result does not depend on it ...
MAY_CHANGE = {
    "Recipe.card_gib",
    "Recipe.out",
    "Recipe.existing_run",
    "DataSpec.max_bad_share",
    "TrainSpec.checkpointing",
    "TrainSpec.eval_every",
    "TrainSpec.save_every",
    "TrainSpec.sample_answers",
    "TrainSpec.report_to",
}
# ... and what changes it a little, and is only said: where the schedule ends, and the order of sums.
WARNED_ABOUT = {
    "TrainSpec.max_steps",
    "TrainSpec.epochs",
    "TrainSpec.kernels",
    "TrainSpec.sharding",
    "TrainSpec.deterministic",
}


def identity(recipe: Recipe, rows: Rows, **more: Any) -> dict[str, Any]:
    """What a run is, as JSON holds it: the recipe's fields, the rows by their hash, versions, and `more`."""
    specs = (recipe, recipe.model, recipe.data, recipe.lora, recipe.train)
    fields = {
        f"{type(spec).__name__}.{field.name}": getattr(spec, field.name)
        for spec in specs
        for field in dataclasses.fields(spec)
        if not dataclasses.is_dataclass(getattr(spec, field.name))
    }
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {
        "recipe": {name: value for name, value in fields.items() if name not in MAY_CHANGE},
        "rows": hash_rows(rows.train),
        "versions": {name: version(name) for name in LIBRARIES},
        **more,
    }


def hash_rows(rows: Dataset) -> str:
    """sha256 of the token ids and labels, in order."""
    digest = hashlib.sha256()
    for name in ("input_ids", "labels"):
        for chunk in rows.data.column(name).chunks:
            values = chunk.flatten()
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    digest.update(str([len(row) for row in rows["seq_lengths"]]).encode())
    return digest.hexdigest()


def refuse_another_run(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Raises UserError, with a line for each difference, when the checkpoint `where` belongs to another run.

    Differences that change the result only a little are printed.
    """
    refused: list[str] = []
    said: list[str] = []
    for name in old["recipe"] | new["recipe"]:
        before, now = old["recipe"].get(name), new["recipe"].get(name)
        if before != now:
            (said if name in WARNED_ABOUT else refused).append(f"{name} was {before!r} and is {now!r}")
    if old["rows"] != new["rows"] and not any(line.startswith("DataSpec.") for line in refused):
        refused.append("the data is not what it was: other rows, another tokenizer or chat template")
    for name in old["versions"] | new["versions"]:
        before, now = old["versions"].get(name), new["versions"].get(name)
        if before != now:
            said.append(f"{name} was {before} and is {now}")
    for name in sorted(old.keys() & new.keys() - {"recipe", "rows", "versions"}):
        if old[name] != new[name]:
            said.append(f"the {name} was {old[name]} and is {new[name]}")
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        raise UserError(
            f"{where} belongs to another run:{lines}\nTake that back to go on with it, or begin anew: ARGS=--overwrite"
        )
    for line in said:
        print(f"warning: {line}; the run goes on, and ends a little differently")
