"""The files of an adapter: their names, whether they are there, and the record of the run that left them."""

import json
from pathlib import Path
from typing import Any

from common.recipe import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
RUN_JSON = "run.json"
_PICKLED_WEIGHTS = "adapter_model.bin"


def require_adapter_files(folder: Path) -> None:
    """Raises UserError where the folder lacks one of the two files that PEFT writes."""
    missing = next((name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()), None)
    if missing == ADAPTER_WEIGHTS and (folder / _PICKLED_WEIGHTS).is_file():
        raise UserError(
            f"{folder} has its weights in {_PICKLED_WEIGHTS}, a pickle, which may run code and is not read: load the "
            f"adapter with PEFT and save it again, which writes {ADAPTER_WEIGHTS}"
        )
    if missing:
        raise UserError(f"{folder} has no adapter ({missing} is missing); a run leaves it when it ends")


def read_run_json(path: Path) -> dict[str, Any]:
    """What run.json says; empty where there is none: the adapter was trained elsewhere.

    Raises UserError for a file that is damaged.
    """
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        run["recipe"]["model"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove it to use the adapter with the recipe's values") from error
    return dict(run)
