"""The licence of a base model, in the words of the hub: what the model's README says, or what is known here."""

from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load

from common.machine.paths import local_path

# As their pages on the hub say (2026-11). The values are the hub's: https://huggingface.co/docs/hub/repositories-licenses
KNOWN_LICENCES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-14B-Instruct": "apache-2.0",
    "Qwen/Qwen3-14B": "apache-2.0",
    "google/gemma-3-1b-it": "gemma",
    "google/gemma-3-270m": "gemma",
    "google/gemma-3-270m-it": "gemma",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3.1",
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama3",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
    "mistralai/Mistral-7B-Instruct-v0.3": "apache-2.0",
}


def base_licence(name: str, commit: str | None) -> dict[str, str]:
    """The fields license, license_name and license_link of a base, as far as they are known; empty where none is.

    name: as in the recipe. commit: the base's on the hub, None for a local folder. Nothing is downloaded: the README is
    read in the local folder, or in the hub's cache.
    """
    fields = _fields_of(_readme_of(name, commit))
    if "license" not in fields and commit is not None and name in KNOWN_LICENCES:
        return {"license": KNOWN_LICENCES[name]}
    link = fields.get("license_link", "")
    if link and not link.startswith(("http://", "https://")):  # a file of the base's repository
        del fields["license_link"]
        if commit is not None:
            fields["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return fields


def _readme_of(name: str, commit: str | None) -> Path | None:
    if commit is None:
        return local_path(name) / "README.md"
    try:
        cached = try_to_load_from_cache(name, "README.md", revision=commit)
    except (HFValidationError, OSError):
        return None
    return Path(cached) if isinstance(cached, str) else None


def _fields_of(readme: Path | None) -> dict[str, str]:
    try:
        values = metadata_load(readme) if readme is not None else None
    except (OSError, ValueError, yaml.YAMLError):  # none, or it is damaged
        return {}
    names = ("license", "license_name", "license_link")
    return {key: values[key] for key in names if isinstance(values.get(key), str)} if values else {}
