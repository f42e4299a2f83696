"""Packed rows of large files, kept: the second start of a run takes seconds.

The name of an entry is a hash of everything that the rows depend on: the files' bytes, the tokenizer with its chat
template, the settings, and the code that makes them. Anything else makes another entry; the newest few stay.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerFast

from common.data.files import is_file
from common.recipe import DataSpec

CACHE = Path(".cache") / "rows"
FROM_BYTES = 8 << 20  # smaller files are tokenised within seconds
ENTRIES_KEPT = 4
CODE_MODULES = ("cache", "chat_format", "conversations", "files", "labels", "packing", "rows")


def cache_folder(spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int) -> Path | None:
    """The folder of these rows in the cache, there or not; None for small files and for data sets of the hub."""
    sources = [Path(source) for source in (spec.source, spec.eval_source) if source is not None]
    if not all(is_file(str(path)) and path.is_file() for path in sources):
        return None
    if sum(path.stat().st_size for path in sources) < FROM_BYTES:
        return None
    digest = hashlib.sha256()
    settings = asdict(spec) | {"seq_len": seq_len, "seed": seed, "template": tokenizer.chat_template}
    settings |= {"special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()}}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name in CODE_MODULES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    for path in sources:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return CACHE / digest.hexdigest()[:32]


def load_cached(folder: Path) -> tuple[Dataset, Dataset | None, dict[str, Any]] | None:
    """Rows to train on, held-out rows, and what is told of them; None where they are not there, or not whole."""
    try:
        told = json.loads((folder / "told.json").read_text(encoding="utf-8"))
        evaluation = load_from_disk(str(folder / "evaluation")) if (folder / "evaluation").exists() else None
        train = load_from_disk(str(folder / "train"))
    except (OSError, ValueError):
        return None
    os.utime(folder)  # the newest stay
    return train, evaluation, told


def save_cached(folder: Path, train: Dataset, evaluation: Dataset | None, told: dict[str, Any]) -> None:
    """Whole or not there: written aside, then renamed. A cache that cannot be written is no reason to stop."""
    aside = folder.parent / f".{os.getpid()}"
    try:
        train.save_to_disk(str(aside / "train"))
        if evaluation is not None:
            evaluation.save_to_disk(str(aside / "evaluation"))
        (aside / "told.json").write_text(json.dumps(told), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        entries = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        print(f"warning: the rows are not kept for the next start: {error.strerror or error}")
        return
    for old in entries[:-ENTRIES_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
