"""What identifies a base model: the sha256 of each of its files. A run records it, and what comes after compares."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from common.machine.disk import sha256_of
from common.model.file_hash import hub_sha256, remembered_sha256
from common.model.weight_files import weight_files

SMALL_FILES_OF_BASE = ("config.json", "tokenizer.json")  # beside the weights; what else there is, a run saves itself


@dataclass(frozen=True)
class BaseRecord:
    """The base of a run, as run.json holds it."""

    sha256: dict[str, str]  # of base_hash
    commit: str | None  # on the hub; None for a local folder


def base_hash(folder: Path) -> dict[str, str]:
    """sha256 by file name, of the weights, config.json and tokenizer.json in a folder that check_safetensors accepts.

    The hub names large files in its cache by their sha256, which check_safetensors compares with the content. Others
    are read, once.
    """
    hashes = {name: hub_sha256(folder / name) or remembered_sha256(folder / name) for name in weight_files(folder)}
    small = [name for name in SMALL_FILES_OF_BASE if (folder / name).is_file()]
    return hashes | {name: sha256_of(folder / name) for name in small}


def read_base_record(folder: Path) -> BaseRecord:
    """Hashes the base in a folder, and reads its commit off the name that the hub's cache gives the folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return BaseRecord(base_hash(folder), folder.name if is_snapshot else None)


def base_record(model: nn.Module) -> BaseRecord | None:
    """The record that load_4bit made before it loaded the model; None for random weights."""
    record = getattr(model, "base_record", None)
    assert record is None or isinstance(record, BaseRecord)
    return record
