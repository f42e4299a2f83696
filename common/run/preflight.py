"""What the end of a run needs, tried at its start: that its files can be written, and that they fit the disk."""

import os
import shutil
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from common.machine.disk import format_bytes, remove
from common.machine.paths import output_path
from common.machine.write_errors import writing
from common.model.lora import trainable_params
from common.plan.plan import Plan
from common.recipe import Recipe, UserError
from common.run.artefacts import save_generation_config, save_tokenizer
from common.run.checkpoints import CHECKPOINTS_KEPT
from common.run.folder import CHECKPOINTS, METRICS, SAVING
from common.run.replaced_run import REPLACED

SMALL_FILES_BYTES = 1 << 20  # run.json, metrics.jsonl, loss.png, report.html


def adapter_bytes(model: PeftModel) -> int:
    """Of adapter_model.safetensors, which is fp32."""
    return 4 * trainable_params(model)


def rehearse_save(model: PeftModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, plan: Plan) -> None:
    """Saves the tokenizer and the generation config into a folder aside, and removes it; looks at the free space.

    Prints a warning when the checkpoints will not fit. Raises UserError when a folder that the run writes into cannot
    be written, when what is trained will not fit there, and when Recipe.fallback_out is not empty.
    """
    folder = Path(recipe.out)
    _try_writing(folder)
    if recipe.fallback_out is not None:
        fallback = output_path(recipe.fallback_out)
        if fallback.exists() and (not fallback.is_dir() or any(fallback.iterdir())):
            raise UserError(f"Recipe.fallback_out is {fallback}, which is not empty; name a new folder")
        with writing(fallback):
            fallback.mkdir(parents=True, exist_ok=True)
        _try_writing(fallback)
        fallback.rmdir()
    aside = folder / SAVING
    try:
        with writing(folder):
            save_tokenizer(tokenizer, aside)
            save_generation_config(model, tokenizer, aside)
        small = SMALL_FILES_BYTES + _size(aside)
    finally:
        remove(aside)
    states = plan.optimizer_bytes or 2 * adapter_bytes(model)
    # and the one that is being written, and that of the best step
    checkpoints = CHECKPOINTS_KEPT + 1 + (recipe.train.keep == "best")
    _look_at_free_space(folder, adapter_bytes(model), states, small, checkpoints)


def _try_writing(folder: Path) -> None:
    """Raises UserError unless files can be made in the folder and in its checkpoints, and metrics.jsonl be changed."""
    for place in (folder, folder / CHECKPOINTS):
        if place.exists():
            with writing(place), tempfile.TemporaryFile(dir=place):
                pass
    if (metrics := folder / METRICS).exists():
        with writing(metrics), metrics.open("ab"):
            pass


def _look_at_free_space(folder: Path, adapter: int, states: int, small: int, checkpoints: int) -> None:
    # An earlier part of this run is replaced; a run that --overwrite replaces stays until the first checkpoint.
    free = shutil.disk_usage(folder).free + _size(folder) - _size(folder / REPLACED)
    if adapter + small > free:
        raise UserError(
            f"{folder} will need {format_bytes(adapter + small)} for the adapter and the files beside it, and "
            f"{format_bytes(free)} are free there; make room, or choose another folder: OUT=..."
        )
    needed = adapter + small + checkpoints * (adapter + states)
    if needed > free:
        print(
            f"warning: {folder} will need {format_bytes(needed)} with {checkpoints} checkpoints of "
            f"{format_bytes(adapter + states)}, and {format_bytes(free)} are free there: make room, or the run goes on "
            "without the checkpoints that do not fit"
        )


def _size(folder: Path) -> int:
    """Bytes of all files in the folder."""
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)
