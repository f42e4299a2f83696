"""Keeps the packed rows of large files on disk: the second start of a run takes seconds.

The name of an entry is a hash of everything that its rows depend on: the bytes of the files, the tokenizer with its
chat template, the settings, and the code that makes the rows. Any change leads to another entry. The newest stay.
"""

import hashlib
import json
import os
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerFast

from common.machine.disk import write_aside
from common.machine.write_errors import failure_while_writing
from common.recipe import DataSpec
from common.sources.fingerprint import FileStates
from common.tokens.vocabulary import vocabulary_limit

CACHE = Path(".cache") / "rows"  # in the working directory
MIN_SOURCE_BYTES = 8 << 20  # smaller files are not cached: they are tokenised within seconds
MAX_ENTRIES = 4
METADATA = "metadata.json"
SHARED = "of-one-run"  # beginning of the names of entries that only the processes of one run read
# the modules that make rows
CODE = tuple(Path(__file__).parents[1] / name for name in ("sources", "conversations", "tokens", "data"))


def cache_folder(
    spec: DataSpec, states: FileStates, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int
) -> Path | None:
    """Returns the folder of these rows in the cache, which may not exist yet. `states` are those of spec's files.

    Returns None for small files and for data sets of the hub: they are not cached.
    """
    sources = [*(source for source, _ in spec.mixture), spec.eval_source]
    states_of_spec = [states.get(source) for source in sources if source is not None]
    hashes = [state.sha256 for state in states_of_spec if state is not None]
    size = sum(state.size for state in states_of_spec if state is not None)
    if len(hashes) < len(states_of_spec) or size < MIN_SOURCE_BYTES:
        return None
    digest = hashlib.sha256()
    settings = asdict(spec) | {"drift_source": None}  # of which no row is made here
    settings |= {"seq_len": seq_len, "seed": seed, "template": tokenizer.chat_template}
    settings |= {"special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()}}
    settings |= {"vocabulary": vocabulary_limit(tokenizer)}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for module in sorted(path for folder in CODE for path in folder.glob("*.py")):
        digest.update(module.read_bytes())
    digest.update(" ".join(hashes).encode())
    return CACHE / digest.hexdigest()[:32]


def load_cached(folder: Path) -> tuple[Dataset, Dataset | None, dict[str, Any]] | None:
    """Rows to train on, held-out rows, and the metadata that save_cached was given.

    None where the entry does not exist or is damaged.
    """
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        evaluation = load_from_disk(str(folder / "evaluation")) if (folder / "evaluation").exists() else None
        train = load_from_disk(str(folder / "train"))
    except (OSError, ValueError):
        return None
    os.utime(folder)  # marks it as used now: save_cached removes the entries that were used longest ago
    return train, evaluation, metadata


def shared_folder() -> Path:
    """The folder of an entry that only the processes of this run will read: of rows that are not cached."""
    return CACHE / f"{SHARED}-{socket.gethostname()}-{os.getpid()}"


def remove_shared(folder: Path) -> None:
    """Removes an entry of shared_folder, and no other. Who has loaded it keeps its rows: they are mapped."""
    if folder.name.startswith(SHARED):
        shutil.rmtree(folder, ignore_errors=True)


def save_cached(folder: Path, train: Dataset, evaluation: Dataset | None, metadata: dict[str, Any]) -> bool:
    """Writes the entry atomically, and removes all entries but the newest MAX_ENTRIES. Returns whether it is written.

    Prints a warning where the disk cannot be written to: the run needs no cache.
    """
    # Several runs, on several machines, may write this entry.
    aside = folder.with_name(f"{folder.name}-{socket.gethostname()}-{os.getpid()}.writing")
    try:
        with write_aside(folder, aside=aside):
            train.save_to_disk(str(aside / "train"))
            if evaluation is not None:
                evaluation.save_to_disk(str(aside / "evaluation"))
            (aside / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
        entries = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    except Exception as error:
        if (reason := failure_while_writing(error)) is None:
            raise
        print(f"warning: the rows are not kept for the next start: {reason}")
        return False
    for old in entries[:-MAX_ENTRIES]:
        shutil.rmtree(old, ignore_errors=True)
    return True
