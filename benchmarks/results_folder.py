"""Where results of benchmarks are kept, under which name, and with which versions of the libraries."""

import json
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from common.recipe import UserError

RESULTS = Path(__file__).parent / "results"


def result_path(kind: str, folder: Path | None = None) -> Path:
    """Makes the folder, benchmarks/results unless given. Returns <kind>_<this machine's GPU, or cpu>.json in it."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return folder / f"{kind}_{re.sub(r'[^a-zA-Z0-9_]+', '_', name).lower()}.json"


def write_result(result: Any, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def read_result(path: Path) -> Any:
    """Raises UserError when there is no such file."""
    if not path.exists():
        raise UserError(f"there is no result {path}")
    return json.loads(path.read_text(encoding="utf-8"))
