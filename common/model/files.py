"""Finds a model's files, on the hub or in a folder, and refuses the ones that cannot be loaded. Safetensors only."""

import contextlib
import json
import re
import struct
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, PretrainedConfig

from common import REPOSITORY
from common.machine.disk import sha256_of
from common.machine.hub import TransportError
from common.recipe import ModelSpec, UserError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # config.json's model_type
CHECKED = Path(".cache") / "checked"
SHIPPED_CONFIGS = REPOSITORY / "models" / "configs"
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja"]
SMALL_FILES += ["vocab.json", "merges.txt", "added_tokens.json"]
# Not "*.safetensors": some repositories hold the same weights twice (Mistral's consolidated.safetensors).
WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def model_folder(spec: ModelSpec, *, weights: bool) -> Path:
    """The folder with the model's small files, and with its weights where asked; downloads what is not there yet.

    Raises UserError when the hub does not give them, and when weights are missing, incomplete or not safetensors.
    """
    folder = Path(spec.name)
    if not folder.is_dir():
        if spec.name.startswith((".", "/", "~")) or spec.name.count("/") != 1:
            raise UserError(f"there is no folder {spec.name}, and it is no hub id (owner/name) either")
        folder = _download(spec, SMALL_FILES + (WEIGHT_FILES if weights else []))
    if weights:
        check_safetensors(folder)
    return folder


def _download(spec: ModelSpec, patterns: list[str]) -> Path:
    page = f"https://huggingface.co/{spec.name}"
    try:
        return Path(snapshot_download(spec.name, revision=spec.revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{spec.name} is gated. Ask for access on {page}, then log in with: .venv/bin/hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{spec.name} has no revision {spec.revision!r}; see {page}/tree/main") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {spec.name} that you may read. Check the name on {page}; if it is private, "
            "log in with: .venv/bin/hf auth login"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, TransportError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{spec.name} is not in the local cache and the hub cannot be reached ({cause}). Connect and try again, "
            f"or download it elsewhere (hf download {spec.name} --local-dir my_model) and use ModelSpec('my_model')"
        ) from error


def load_config(spec: ModelSpec, folder: Path | None = None) -> PretrainedConfig:
    """The model's config: from `folder` where given, else from its own folder, models/configs (no network), or the hub.

    Raises UserError for an architecture that is not one of ARCHITECTURES, and for a config that cannot be read.
    """
    shipped = SHIPPED_CONFIGS / (spec.name.replace("/", "--") + ".json")
    if folder is None and shipped.exists() and not Path(spec.name).is_dir():
        path = shipped
    else:
        path = (folder or model_folder(spec, weights=False)) / "config.json"
    if not path.exists():
        raise UserError(f"{spec.name} has no config.json: it is not a transformers model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type = values["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable model config: {error}") from error
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{spec.name} is of type {model_type!r}; the recipes fine-tune {', '.join(ARCHITECTURES)} models"
        )
    config = AutoConfig.for_model(**values)
    if spec.layers is not None:
        config.num_hidden_layers = min(spec.layers, config.num_hidden_layers)
        config.layer_types = config.layer_types[: spec.layers] if getattr(config, "layer_types", None) else None
    return config


def check_safetensors(folder: Path) -> None:
    """Raises UserError unless the folder's weights are complete safetensors files, and as the hub has them."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is damaged: {error}; download it again") from error
    else:
        shards = ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing and not index.exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise UserError(
                f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are opened; "
                "take a model with safetensors, or convert it: https://huggingface.co/spaces/safetensors/convert"
            )
        raise UserError(f"{folder} has no weights: there is no model.safetensors and no model.safetensors.index.json")
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}")
    for shard in shards:
        check_complete(folder / shard)
        _check_content(folder / shard)


def _check_content(path: Path) -> None:
    """Raises UserError unless a file in the hub's cache is what the hub has: there a large file's name is its sha256.

    Each is read once, at a GiB a second or so; what was checked is noted in CHECKED.
    """
    blob = path.resolve()
    if not path.is_symlink() or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    status = blob.stat()
    note = CHECKED / f"{blob.name}-{status.st_size}-{status.st_mtime_ns}"
    if note.exists():
        return
    if status.st_size > 1 << 30:
        print(f"checking {path.name} ({status.st_size / (1 << 30):.1f} GiB), once", flush=True)
    if sha256_of(blob) != blob.name:
        raise UserError(f"{path} is damaged: it is not what the hub has. Delete {blob} and run again")
    with contextlib.suppress(OSError):  # then it is checked again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def check_complete(path: Path) -> None:
    """Raises UserError unless the file is as long as its safetensors header says."""
    size = path.stat().st_size
    again = "delete it and download it again"
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + header_bytes > size:
            raise UserError(f"{path} is cut short: {size:,} bytes, less than its header; {again}")
        try:
            header = json.loads(file.read(header_bytes))
            data_bytes = max(
                (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a safetensors file, or its header is damaged; {again}") from error
    expected = 8 + header_bytes + data_bytes
    if size != expected:
        raise UserError(f"{path} is cut short or damaged: {size:,} bytes instead of {expected:,}; {again}")
