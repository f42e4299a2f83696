"""The reference of a preference loss: the log-likelihoods of all answers under the model as the run begins.

They are computed in one pass before the first step, and kept in a file that a resumed run and a second one find again.
A new adapter adds nothing to the base, so the reference is the base; a run that starts from an adapter compares with
that. Training then computes nothing but the model that it trains.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset, List, Value
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.batches import Batch, collate
from common.data.mismatched import mismatch_answers
from common.data.rows import Rows, find_examples
from common.machine.collectives import all_gather, all_reduce_max, broadcast_from_main
from common.machine.device import this_machine
from common.machine.disk import write_aside
from common.machine.out_of_memory import out_of_memory
from common.machine.processes import is_main_process, rank, world_size
from common.machine.slow_work import report_slow_work
from common.machine.write_errors import failure_while_writing
from common.model.attention import uses_packed_attention
from common.model.base_hash import base_record
from common.model.sharding import is_sharded
from common.model.start_adapter import start_record
from common.plan.plan import Plan
from common.recipe import PreferenceSpec, Recipe, UserError
from common.run.held_out_loss import own_batches
from common.run.preference_evaluation import likelihoods_without_gradient
from common.run.resume import hash_rows
from common.run.step_down import StepDown

REFERENCE_FILES = Path(".cache") / "references"  # in the working directory
MAX_REFERENCES = 8  # the newest stay; one takes 8 bytes an answer
MAX_NAMED_ANSWERS = 3
# the modules that compute a log-likelihood
MODEL_CODE = tuple(Path(__file__).parents[1] / name for name in ("kernels", "model"))
LIBRARIES_OF_THE_MODEL = ("torch", "transformers", "peft", "bitsandbytes")

Columns = dict[str, list[list[float]]]  # a list for each packed row, by the name of the column


def with_reference(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, recipe: Recipe, plan: Plan
) -> Rows:
    """The rows with a column `reference`: float64, the log-likelihood of each conversation's trained tokens in nats.

    For KTO with a column `kl_reference` too: those of the row with mismatched answers (mismatch_answers), none for a
    row of a single example. Where the recipe's loss needs no reference the rows are returned as they are. All
    processes must call it, before the first step. Raises UserError when one is not finite, and out of memory.
    """
    spec = recipe.preference
    if spec is None or not spec.needs_reference:
        return rows
    sets = {"train": rows.train} | ({"evaluation": rows.evaluation} if rows.evaluation is not None else {})
    names = _reference_columns(spec)
    sizes = [count for data in sets.values() for name in names for count in _lengths(data, name)]
    path = _place(model, rows, recipe)
    flat = broadcast_from_main(_load(path, sum(sizes)) if path is not None and is_main_process() else None)
    if flat is not None:
        print(f"reference: {len(flat):,} log-likelihoods, taken from {path}")
    else:
        size = plan.reference_rows or plan.micro_batch_rows
        step_down = StepDown(model, plan.checkpointing)
        computed = (_compute(model, tokenizer, data, names, size, step_down) for data in sets.values())
        found = [values for rows_of_set in computed for values in rows_of_set]
        flat = np.array([value for values in found for value in values], dtype=np.float64)
        _refuse_not_finite(flat, sets, names, tokenizer, recipe)
        kept = path is not None and broadcast_from_main(_save(path, flat) if is_main_process() else None)
        print(f"reference: {len(flat):,} log-likelihoods" + (f", kept in {path}" if kept else ""))
    parts = iter(np.split(flat, np.cumsum(sizes)[:-1]))
    made = {
        which: _with_columns(data, {name: [next(parts).tolist() for _ in range(len(data))] for name in names})
        for which, data in sets.items()
    }
    return replace(rows, train=made["train"], evaluation=made.get("evaluation"))


def with_reference_columns(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset, spec: PreferenceSpec
) -> Dataset:
    """The rows with the columns that with_reference adds, by the model as it is. Of one process, nothing is kept."""
    names = _reference_columns(spec)
    values = iter(_compute(model, tokenizer, rows, names, 1, None))
    return _with_columns(rows, {name: [next(values) for _ in range(len(rows))] for name in names})


def _reference_columns(spec: PreferenceSpec) -> tuple[str, ...]:
    return ("reference", "kl_reference") if spec.kind == "rated" else ("reference",)


def _lengths(rows: Dataset, name: str) -> list[int]:
    """How many log-likelihoods each row has in the column of this name."""
    counts = [len(lengths) for lengths in rows["seq_lengths"]]
    return [0 if name == "kl_reference" and count < 2 else count for count in counts]


def _with_columns(rows: Dataset, columns: Columns) -> Dataset:
    for name, values in columns.items():
        rows = rows.add_column(name, values, feature=List(Value("float64")))  # its lists may all be empty
    return rows


def _compute(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    names: Sequence[str],
    micro_batch_rows: int,
    step_down: StepDown | None,
) -> list[list[float]]:
    """The log-likelihoods of all rows, a list a row: those of the first column, and after them those of the next."""
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id, padding_free=uses_packed_attention(model))
    found: list[list[float]] = []
    for name in names:
        mismatched = name == "kl_reference"
        what = "the reference's log-likelihoods" + (" of mismatched answers" if mismatched else "")
        with _out_of_memory_in_words():
            collate_these = partial(_collate, collate_rows, mismatched)
            own = _compute_own(model, rows, collate_these, micro_batch_rows, step_down, what)
        counts = iter(_lengths(rows, "reference"))
        gathered, places = all_gather(own), [0] * world_size()
        for row, kept in enumerate(_lengths(rows, name)):
            which, count = row % world_size(), next(counts)
            start = places[which]
            places[which] += count
            found.append(gathered[which][start : start + kept])
    return found


def _collate(collate_rows: Any, mismatched: bool, rows: Sequence[dict[str, Any]]) -> Batch:
    """mismatched: a row of a single example, which has no mismatched one, is computed as it is, and not used."""
    made: Batch = collate_rows([mismatch_answers(row) or row for row in rows] if mismatched else rows)
    return made


def _compute_own(
    model: PeftModel, rows: Dataset, collate_rows: Any, size: int, step_down: StepDown | None, what: str
) -> list[float]:
    """The log-likelihoods of this process's share of the rows (own_batches), conversation after conversation."""

    def likelihoods(batch: Batch) -> Tensor:
        return likelihoods_without_gradient(model, batch).total

    own: list[float] = []
    batches = -(-len(range(rank(), len(rows), world_size())) // size)
    fillers = all_reduce_max(batches) - batches if is_sharded(model) else 0  # all take part in gathering each layer
    with report_slow_work(what, len(rows), "rows") as work:
        for number, batch in enumerate(own_batches(rows, collate_rows, size)):
            if step_down is None:
                own += likelihoods(batch).tolist()
            else:
                own += step_down.compute(likelihoods, [batch], 0, backward=False, join=torch.cat).tolist()
            work.done = min(len(rows), (number + 1) * size * world_size())
        for _ in range(fillers):
            likelihoods(collate_rows([rows[0]]))
    return own


@contextmanager
def _out_of_memory_in_words() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if (memory := out_of_memory(error)) is None:
            raise
        raise UserError(
            f"out of {memory} memory while the reference is computed, before the first step. Lower TrainSpec.seq_len, "
            "or free the card (nvidia-smi shows who else uses it)"
        ) from error


def _refuse_not_finite(
    flat: npt.NDArray[np.float64],
    sets: dict[str, Dataset],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> None:
    """Raises UserError when a log-likelihood is not finite, with the places of the first such answers."""
    bad = np.flatnonzero(~np.isfinite(flat))
    if not len(bad):
        return
    wanted, number, examples = set(bad[:MAX_NAMED_ANSWERS].tolist()), 0, list[list[int]]()
    for data, name in ((data, name) for data in sets.values() for name in names):
        for row, kept in enumerate(_lengths(data, name)):
            if here := wanted & {*range(number, number + kept)}:
                packed = data[row]
                ends = np.cumsum(packed["seq_lengths"]).tolist()
                starts = [0, *ends]
                examples += [packed["input_ids"][starts[i - number] : ends[i - number]] for i in sorted(here)]
            number += kept
    places = find_examples(recipe.data, tokenizer, recipe.train.seq_len, examples)
    named = f" ({'; '.join(places)}{' and more' if len(bad) > len(places) else ''})" if places else ""
    raise UserError(
        f"the model gives no finite log-likelihood for {len(bad):,} of {len(flat):,} answers{named}: remove them from "
        "the data, or look at the base model and the adapter that the run starts from"
    )


def _place(model: PeftModel, rows: Rows, recipe: Recipe) -> Path | None:
    """The file of these log-likelihoods. None for random weights, which nothing identifies."""
    base, start = base_record(model), start_record(model)
    if base is None:
        return None
    digest = hashlib.sha256()
    settings = {
        "base": base.sha256,
        "start": None if start is None else start.sha256,
        "rows": [hash_rows(data) for data in (rows.train, rows.evaluation) if data is not None],
        "kind": recipe.data.kind,
        "bits": recipe.model.bits,
        "rope_scaling": recipe.model.rope_scaling,
        "lora": [recipe.lora.dora, recipe.lora.rslora],
        "kernels": recipe.train.kernels,
        "machine": str(this_machine()),
        "dtype": str(this_machine().dtype),
        "versions": [version(name) for name in LIBRARIES_OF_THE_MODEL],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for module in sorted(path for folder in MODEL_CODE for path in folder.glob("*.py")):
        digest.update(module.read_bytes())
    return REFERENCE_FILES / f"{digest.hexdigest()[:32]}.safetensors"


def _load(path: Path, count: int) -> npt.NDArray[np.float64] | None:
    """None where there is no such file, or it is damaged."""
    try:
        flat = load_file(path)["log_likelihoods"]
        os.utime(path)  # marks it as used now
    except (OSError, KeyError, SafetensorError):
        return None
    return flat if flat.dtype == np.float64 and flat.shape == (count,) and np.isfinite(flat).all() else None


def _save(path: Path, flat: npt.NDArray[np.float64]) -> bool:
    """Writes the file atomically, and removes all but the newest. Returns whether it is written."""
    aside = path.with_name(f"{path.name}-{os.getpid()}.writing")
    try:
        with write_aside(path, aside=aside):
            save_file({"log_likelihoods": flat}, aside)
        files = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for old in files[:-MAX_REFERENCES]:
            old.unlink(missing_ok=True)
    except Exception as error:
        if (reason := failure_while_writing(error)) is None:
            raise
        print(f"warning: the reference is not kept for the next start: {reason}")
        return False
    return True
