"""Finds a model's folder: a local one as it is, one of the hub in the hub's cache, downloaded where it is missing."""

from pathlib import Path

from huggingface_hub import snapshot_download

from common.machine.hub import HubRepository, first_line, hub_errors_in_words
from common.model.integrity import check_safetensors
from common.recipe import ModelSpec, UserError

SMALL_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja"]
SMALL_FILES += ["vocab.json", "merges.txt", "added_tokens.json"]
# Not "*.safetensors": some repositories hold the same weights twice (Mistral's consolidated.safetensors).
WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def model_folder(spec: ModelSpec, *, weights: bool) -> Path:
    """The folder with the model's small files, and with its weights where asked; downloads what is missing.

    Raises UserError when the hub does not give the files, and as `check_safetensors` does for the weights.
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
    instead = f"download it elsewhere (hf download {spec.name} --local-dir my_model) and use ModelSpec('my_model')"
    try:
        with hub_errors_in_words(HubRepository("model", spec.name, spec.revision, instead)):
            return Path(snapshot_download(spec.name, revision=spec.revision, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{spec.name} cannot be downloaded: {first_line(error)}. Try again, or {instead}") from error
