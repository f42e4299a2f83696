"""The folder of one run: the names of its files, who may use it, and a check before a run writes into it.

A run holds the lock of its folder alone, from before it writes until it ends; of its processes the main one does, and
the others write only together with it. Commands that read the folder and take long share the lock.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.machine.disk import WRITING_SUFFIX, remove
from common.machine.lock import LockHeld, hold_lock, refuse_held
from common.model.adapter_files import ADAPTER_CONFIG as ADAPTER_CONFIG
from common.model.adapter_files import ADAPTER_WEIGHTS as ADAPTER_WEIGHTS
from common.model.adapter_files import RUN_JSON as RUN_JSON
from common.recipe import ExistingRun, UserError
from common.run.replaced_run import DONE, MOVING, REPLACED, remove_replaced, set_aside, settle

EVAL_JSON = "eval.json"
HELD_OUT_ROWS = "held_out.parquet"
METRICS = "metrics.jsonl"
LOSS_PICTURE = "loss.png"
MODEL_CARD = "README.md"
REPORT = "report.html"
CHECKPOINTS, CHECKPOINT_PREFIX = "checkpoints", "checkpoint-"  # checkpoints/checkpoint-100: of step 100
LOCK_FILE = ".lock"  # says which process runs here; a killed run leaves it, and it locks nothing then
MLFLOW, SWANLAB, TENSORBOARD, TRACKIO, WANDB = "mlflow", "swanlog", "tensorboard", "trackio", "wandb"  # of trackers
RUN_FOLDERS = (CHECKPOINTS, MLFLOW, SWANLAB, TENSORBOARD, TRACKIO, WANDB)
SAVING = ".saving"  # a folder for files that are being written; a killed run leaves it
RUN_FILES = (  # --overwrite replaces these and RUN_FOLDERS, and nothing else
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    "chat_template.jinja",
    EVAL_JSON,
    "generation_config.json",
    HELD_OUT_ROWS,
    LOSS_PICTURE,
    METRICS,
    MODEL_CARD,
    REPORT,
    RUN_JSON,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
LEFTOVERS = {f"{name}{WRITING_SUFFIX}" for name in RUN_FILES}  # of a run that was killed while it wrote one of them


class RunUnderWay(UserError):
    """A run of another process is under way in the folder."""


class HoldsRun(UserError):
    """The folder holds a run, and nothing says what is to become of it."""


@contextlib.contextmanager
def hold_run_folder(out: str, existing_run: ExistingRun) -> Iterator[Path]:
    """Gives the folder to a run of this process, prepared as prepare_run_folder says, and keeps all others out of it.

    A run that fails before its first checkpoint leaves the folder as it was: the run that it was to replace is put
    back. A folder that the run has left empty is removed. Raises UserError as prepare_run_folder and
    refuse_run_under_way, and when a command reads the folder.
    """
    refuse_run_under_way(out)
    folder = Path(out)
    check_run_folder(folder, existing_run)  # first: nothing is written into a folder that is refused
    _make_folder(folder)
    try:
        with _run_lock_in_words(folder), hold_lock(folder / LOCK_FILE):
            try:
                yield prepare_run_folder(out, existing_run)
            except BaseException:
                _settle(folder)
                raise
            remove_replaced(folder)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def hold_for_reading(out: str) -> Iterator[None]:
    """Keeps runs out of the folder while a command reads it. Raises RunUnderWay as refuse_run_under_way."""
    with _run_lock_in_words(Path(out)), hold_lock(Path(out) / LOCK_FILE, shared=True):
        yield


def refuse_run_under_way(out: str) -> None:
    """Raises RunUnderWay when a run of another process is under way in the folder. Takes no time and writes nothing."""
    with _run_lock_in_words(Path(out)):
        refuse_held(Path(out) / LOCK_FILE)


def put_old_run_back(out: str) -> None:
    """Puts back a run that was to be replaced by one that was killed before its first checkpoint.

    Does nothing while a run is under way there, or where the folder cannot be written.
    """
    folder = Path(out)
    if any((folder / name).is_dir() for name in (MOVING, REPLACED, DONE)):
        with contextlib.suppress(LockHeld, OSError), hold_lock(folder / LOCK_FILE):
            _settle(folder)


def _settle(folder: Path) -> None:
    # run.json is there when the adapter is
    has_successor = any((folder / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*")) or (folder / RUN_JSON).exists()
    if settle(folder, {*RUN_FILES, *RUN_FOLDERS, *LEFTOVERS, SAVING}, has_successor=has_successor):
        print(f"the run that was to be replaced is back in {folder}: the new one had no checkpoint yet")


def refuse_inside(target: Path, out: str, variable: str) -> None:
    """Raises UserError when `target` lies in the run's folder, which would then hold something that is no run.

    variable: the Makefile's, which names the target.
    """
    if target.resolve().is_relative_to(Path(out).resolve()):
        raise UserError(
            f"{target} lies in the folder of a run, which holds the run's own files alone; choose another place: "
            f"{variable}=..."
        )


@contextlib.contextmanager
def _run_lock_in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except LockHeld as error:
        if not str(error):
            raise UserError(
                f"a command (make eval, merge, export, report or push) reads {folder}: wait until it has ended, or "
                "choose another folder: OUT=..."
            ) from error
        raise RunUnderWay(
            f"a run is under way in {folder} ({error}): wait until it has ended, or name another folder: OUT=..."
        ) from error


def prepare_run_folder(out: str, existing_run: ExistingRun) -> Path:
    """Makes the folder ready for a run: new, its old run set aside, or with the run to resume. Returns its path.

    Raises UserError as check_run_folder, and when it cannot be made.
    """
    folder = Path(out)
    check_run_folder(folder, existing_run)
    if folder.is_dir():
        _settle(folder)
    names = check_run_folder(folder, existing_run)
    shutil.rmtree(folder / SAVING, ignore_errors=True)
    for leftover in folder.glob(f"*{WRITING_SUFFIX}"):
        remove(leftover)
    if existing_run == "overwrite" and names:
        set_aside(folder, names)
    _make_folder(folder)
    return folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; choose another folder: OUT=...") from error


def check_run_folder(folder: Path, existing_run: ExistingRun) -> set[str]:
    """Returns the names of what a run left in the folder. Writes nothing.

    Raises HoldsRun when it holds a run and neither --resume nor --overwrite says what to do with it, and UserError when
    it holds anything that no run wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another output folder: OUT=...")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    names -= {SAVING, *LEFTOVERS, DONE}
    names -= {name for name in names if name.startswith(f"{REPORT}.") and name.endswith(WRITING_SUFFIX)}  # make report
    if (folder / LOCK_FILE).is_file() and not (folder / LOCK_FILE).is_symlink():
        names -= {LOCK_FILE}
    known = {*RUN_FILES, *RUN_FOLDERS, REPLACED, MOVING} if names != {MODEL_CARD} else set()
    foreign = sorted(names - known)  # a README.md alone is no run's: its adapter would be beside it
    if foreign:
        raise UserError(f"{folder} holds something that is no run ({foreign[0]}); choose another folder: OUT=...")
    if names and existing_run == "refuse":
        raise HoldsRun(
            f"{folder} already holds a run. Go on with it: ARGS=--resume; replace it: ARGS=--overwrite; "
            "or choose another folder: OUT=..."
        )
    return names
