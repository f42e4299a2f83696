"""The folder of one run: the names of its files, and a check before a run writes into it."""

import shutil
from pathlib import Path

from common.recipe import ExistingRun, UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
RUN_JSON = "run.json"
EVAL_JSON = "eval.json"
METRICS = "metrics.jsonl"
LOSS_PICTURE = "loss.png"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
TENSORBOARD, TRACKIO, WANDB = "tensorboard", "trackio", "wandb"  # folders of trackers
RUN_FOLDERS = (CHECKPOINTS, TENSORBOARD, TRACKIO, WANDB)
SAVING = ".saving"  # a folder for files that are being written; a killed run leaves it
RUN_FILES = (  # --overwrite removes these and RUN_FOLDERS, and nothing else
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    "chat_template.jinja",
    EVAL_JSON,
    "generation_config.json",
    LOSS_PICTURE,
    METRICS,
    REPORT,
    RUN_JSON,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def prepare_run_folder(out: str, existing_run: ExistingRun) -> Path:
    """Makes the folder ready for a run: new, emptied of an old run, or with the run to resume. Returns its path.

    Raises UserError when it holds a run and neither --resume nor --overwrite says what to do with it, and when it
    holds anything that no run wrote.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another output folder: OUT=...")
    shutil.rmtree(folder / SAVING, ignore_errors=True)
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(names - set(RUN_FILES) - set(RUN_FOLDERS))
    if foreign:
        raise UserError(f"{folder} holds something that is no run ({foreign[0]}); choose another folder: OUT=...")
    if names and existing_run == "refuse":
        raise UserError(
            f"{folder} already holds a run. Go on with it: ARGS=--resume; replace it: ARGS=--overwrite; "
            "or choose another folder: OUT=..."
        )
    if existing_run == "overwrite":
        for name in names & set(RUN_FILES):
            (folder / name).unlink()
        for name in RUN_FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from error
    return folder
