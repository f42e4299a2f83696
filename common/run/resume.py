"""Whether a run may go on from a checkpoint: what the checkpoint belongs to is compared with what would go on."""

import contextlib
import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerState

from common.data.rows import Rows
from common.machine.collectives import barrier, broadcast_from_main, run_on_main
from common.machine.device import this_machine
from common.machine.disk import remove_leftovers
from common.machine.paths import is_same_place
from common.machine.slow_work import report_slow_work
from common.model.start_adapter import StartRecord
from common.plan.plan import Plan
from common.recipe import PREFERENCE_DEFAULTS, DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec, UserError
from common.run.best import best_step, held_out_losses, is_out_of_patience
from common.run.checkpoints import go_back_to, list_checkpoints, newest_intact, read_run_identity

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")
# Fields of a recipe that name a place, and the part of run_identity that is a hash of what lies there
CONTENT_OF = {
    "DataSpec.source": "rows",
    "DataSpec.sources": "rows",
    "DataSpec.eval_source": "held_out",
    "ModelSpec.chat_template": "rows",
    "ModelSpec.name": "base",
    "LoraSpec.start_from": "start",
}
# Fields of a recipe that may change between two parts of a run. Any other change is refused.
RESUME_IGNORES = {  # the result does not depend on them
    "Recipe.card_gib",
    "Recipe.out",
    "Recipe.fallback_out",
    "Recipe.existing_run",
    "DataSpec.max_bad_share",
    "DataSpec.max_long_share",
    "DataSpec.drift_source",
    "DataSpec.kind",  # follows from PreferenceSpec.loss
    "TrainSpec.checkpointing",
    "TrainSpec.weights_on_host",
    "TrainSpec.embedding_on_host",
    "TrainSpec.eval_every",
    "TrainSpec.save_every",
    "TrainSpec.sample_answers",
    "TrainSpec.report_to",
}
RESUME_WARNS_OF = {  # they change the result a little: where the run ends, what it leaves, and the order of sums
    "TrainSpec.max_steps",
    "TrainSpec.epochs",
    "TrainSpec.keep",
    "TrainSpec.patience",
    "TrainSpec.kernels",
    "TrainSpec.sharding",
    "TrainSpec.deterministic",
}
# What a field was in a checkpoint of a version that did not have it
DEFAULTS = {
    f"{spec.__name__}.{field.name}": list(field.default) if isinstance(field.default, tuple) else field.default
    for spec in (Recipe, ModelSpec, DataSpec, LoraSpec, TrainSpec)
    for field in dataclasses.fields(spec)
    if field.default is not dataclasses.MISSING
}


def run_identity(
    recipe: Recipe, rows: Rows, plan: Plan, base: dict[str, str] | None = None, start: StartRecord | None = None
) -> dict[str, Any]:
    """What a checkpoint of this run belongs to, as JSON can hold it: recipe, rows by their hash, versions, sizes.

    base: the sha256 of each of the base model's files (base_hash); None for random weights. start: the adapter that
    the run started from; None for a new one.
    """
    specs = (recipe, recipe.model, recipe.data, recipe.lora, recipe.train)
    fields = {
        f"{type(spec).__name__}.{field.name}": getattr(spec, field.name)
        for spec in specs
        for field in dataclasses.fields(spec)
        if not dataclasses.is_dataclass(getattr(spec, field.name)) and field.name != "preference"
    }
    if (spec := recipe.preference) is not None:  # by what its values come to: None is the loss's own
        fields |= {"PreferenceSpec.loss": spec.loss}
        fields |= {f"PreferenceSpec.{name}": spec.value(name) for name in PREFERENCE_DEFAULTS[spec.loss]}
    fields = json.loads(json.dumps(fields))  # tuples become lists, as in the checkpoint
    return {
        "recipe": {name: value for name, value in fields.items() if name not in RESUME_IGNORES},
        "rows": hash_rows(rows.train),
        "held_out": None if rows.evaluation is None else hash_rows(rows.evaluation),
        "base": base,
        "start": None if start is None else start.sha256,
        "versions": {name: version(name) for name in LIBRARIES},
        "plan": f"{plan.micro_batch_rows} x {plan.accumulation} rows on {plan.layout.processes} processes",
        "machine": str(this_machine()),
    }


def hash_rows(rows: Dataset) -> str:
    """sha256 of the rows' token ids, labels and lengths, in order, and of the signs of preferences."""
    digest = hashlib.sha256()
    for name in ("input_ids", "labels"):
        for chunk in rows.data.column(name).chunks:
            values = chunk.flatten()
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    digest.update(str([len(row) for row in rows["seq_lengths"]]).encode())
    if "signs" in rows.column_names:
        digest.update(str(rows["seq_lengths"][:]).encode() + str(rows["signs"][:]).encode())
    return digest.hexdigest()


def refuse_another_run(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Raises UserError, with a line for each difference, when the checkpoint `where` belongs to another run.

    old and new: run_identity of the checkpoint and of this run. Prints the differences that change the result only a
    little.
    """
    refused: list[str] = []
    warned: list[str] = []
    for name in old["recipe"] | new["recipe"]:
        before, now = old["recipe"].get(name, DEFAULTS.get(name)), new["recipe"].get(name)
        if before == now or _names_same_place(name, before, now):
            continue
        change = f"{name} was {before!r} and is {now!r}"
        if before and now and _has_same_content(name, old, new):
            print(f"{change}: its content is the same")
        else:
            (warned if name in RESUME_WARNS_OF else refused).append(change)
    if old["rows"] != new["rows"] and not any(line.startswith("DataSpec.") for line in refused):
        refused.append("the data is not what it was: other rows, another tokenizer or chat template")
    changed = _changed_files(old.get("base"), new["base"])
    if changed and not any(line.startswith("ModelSpec.") for line in refused):
        refused.append(f"the base model is not what it was: {', '.join(changed)} changed")
    if old.get("start") != new["start"] and not any(line.startswith("LoraSpec.start_from") for line in refused):
        refused.append("the adapter that the run started from is not what it was (LoraSpec.start_from)")
    if old.get("held_out", new["held_out"]) != new["held_out"] and not refused:
        print("warning: the held-out rows are not what they were: their losses before and after this do not compare")
    for name in old["versions"] | new["versions"]:
        before, now = old["versions"].get(name), new["versions"].get(name)
        if before != now:
            warned.append(f"{name} was {before} and is {now}")
    for name in sorted(old.keys() & new.keys() - {"recipe", "versions", *CONTENT_OF.values()}):
        if old[name] != new[name]:
            warned.append(f"the {name} was {old[name]} and is {new[name]}")
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        raise UserError(
            f"{where} belongs to another run:{lines}\nTake that back to go on with it, or begin anew: ARGS=--overwrite"
        )
    for line in warned:
        print(f"warning: {line}; the run goes on, and ends a little differently")


def _names_same_place(field: str, before: Any, now: Any) -> bool:
    return (
        field in CONTENT_OF
        and isinstance(before, str)
        and isinstance(now, str)
        and bool(before and now)
        and is_same_place(before, now)
    )


def _has_same_content(field: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two places that a field named hold the same: by their hash in run_identity, where it has one."""
    content = CONTENT_OF.get(field, "")
    return old.get(content) is not None and old[content] == new[content]


def _changed_files(before: dict[str, str] | None, now: dict[str, str] | None) -> list[str]:
    """Names of the base's files that have another sha256 now; none where one of the two is not known."""
    if before is None or now is None:
        return []
    return sorted(name for name in before | now if before.get(name) != now.get(name))


def checkpoint_to_resume(folder: Path, run: dict[str, Any], *, keeps_best: bool = False) -> Path | None:
    """The newest intact checkpoint in the folder, and says which; None where there is none.

    Removes newer, damaged ones. run: run_identity of this run. keeps_best: whether the one with the lowest held-out
    loss stays as well. Raises UserError when the checkpoint belongs to another run.
    """
    run_on_main(lambda: remove_leftovers(folder))
    with report_slow_work("verifying the newest checkpoint"):
        newest = newest_intact(folder)
    if newest is None:
        print(f"{folder} holds no checkpoint to go on from: starting from the beginning")
        return None
    refuse_another_run(read_run_identity(newest), run, str(newest))
    barrier()  # every process has read them before any is removed
    best = best_step(held_out_losses(read_state(newest).log_history)) if keeps_best else None
    run_on_main(lambda: go_back_to(newest, best))
    print(f"going on from {newest}")
    return newest


def read_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def rows_per_step_before(folder: Path) -> int | None:
    """Rows per step of the run whose checkpoints are in the folder, by the newest that tells; None where none does.

    Every process calls it.
    """
    found: int | None = None
    for checkpoint in reversed(list_checkpoints(folder)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # checkpoint_to_resume names the damaged
            found = read_run_identity(checkpoint)["recipe"]["TrainSpec.rows_per_step"]
    return broadcast_from_main(found)


def finished_state(checkpoint: Path, steps: int, patience: int | None = None) -> TrainerState | None:
    """The trainer's state in a checkpoint after which no optimizer step is left; None when some are.

    steps: of the whole run, as it would be trained now. patience: TrainSpec's, which may have ended it earlier.
    """
    state = read_state(checkpoint)
    has_ended = state.global_step >= steps or is_out_of_patience(held_out_losses(state.log_history), patience)
    return state if has_ended else None
