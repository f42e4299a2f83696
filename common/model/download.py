"""Finds a model's folder: a local one as it is, one of the hub in the hub's cache, downloaded where it is missing."""

import contextlib
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from common.machine.hub import HubRepository, TransportError, first_line, hub_errors_in_words
from common.machine.paths import local_path
from common.model.integrity import check_safetensors
from common.model.weight_files import INDEX, SINGLE, weight_files
from common.recipe import ModelSpec, UserError

SMALL_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja"]
SMALL_FILES += ["vocab.json", "merges.txt", "added_tokens.json", INDEX]  # the index says which files to download


def model_folder(spec: ModelSpec, *, weights: bool) -> Path:
    """The folder with the model's small files, and with its weights where asked; downloads what is missing.

    Raises UserError when the hub does not give the files, and as `check_safetensors` does for the weights.
    """
    folder = local_path(spec.name)
    if not folder.is_dir():
        if spec.name.startswith((".", "/", "~")) or spec.name.count("/") != 1:
            raise UserError(f"there is no folder {folder}, and it is no hub id (owner/name) either")
        folder = _download(spec, SMALL_FILES)
        if weights:
            folder = _download(spec, SMALL_FILES + _weights_on_hub(spec, folder))
    if weights:
        check_safetensors(folder)
    return folder


def _weights_on_hub(spec: ModelSpec, folder: Path) -> list[str]:
    """The weight files to download, by the index in `folder`. Some repositories hold other weights beside them.

    Raises UserError when the hub has two models in one repository, before either is downloaded.
    """
    files = weight_files(folder)
    if SINGLE in files or all((folder / file).is_file() for file in files):
        return files
    with contextlib.suppress(HfHubHTTPError, OfflineModeIsEnabled, TransportError, OSError):  # _download reports it
        if HfApi().file_exists(spec.name, SINGLE, revision=folder.name):
            raise UserError(
                f"{spec.name} holds two models on the hub: {SINGLE}, and what {INDEX} names. Download one: "
                f"hf download {spec.name} --exclude {SINGLE} --local-dir my_model, and ModelSpec('my_model')"
            )
    return files


def _download(spec: ModelSpec, patterns: list[str]) -> Path:
    instead = f"download it elsewhere (hf download {spec.name} --local-dir my_model) and use ModelSpec('my_model')"
    try:
        with hub_errors_in_words(HubRepository("model", spec.name, spec.revision, instead)):
            return Path(snapshot_download(spec.name, revision=spec.revision, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{spec.name} cannot be downloaded: {first_line(error)}. Try again, or {instead}") from error
