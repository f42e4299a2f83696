"""README.md: the model card of a run's adapter, as the hub shows it. It names nothing of this machine.

Folders are left out of the names of files and local models, and the text has no command, no user and no host.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from common.machine.disk import write_text_atomically
from common.machine.paths import local_path
from common.model.base_licence import base_licence
from common.recipe import UserError
from common.run.folder import MODEL_CARD, RUN_JSON
from common.run.pages import read_object, render
from common.sources.source_files import is_file, names_without_folders

CARD_TEMPLATE = "model_card.md.jinja"
LOCAL_ADAPTER = 'ADAPTER = "."  # the folder with these files, or the name of their repository on the hub'
TAGS = ["lora", "sft", "text-generation"]


def write_model_card(folder: Path) -> Path:
    """Writes README.md from run.json and the names of the files beside it. Returns its path.

    Raises UserError when the folder has no run.json, or one of another version, and OSError when it cannot be written.
    """
    if not (folder / RUN_JSON).exists():
        raise UserError(
            f"{folder} has no {RUN_JSON} to make a model card of: write {folder / MODEL_CARD}, which says what it is"
        )
    run = read_object(folder / RUN_JSON)
    try:
        text = render(CARD_TEMPLATE, card_values(run, folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / RUN_JSON} is of another version, or damaged: {error!r}") from error
    write_text_atomically(folder / MODEL_CARD, text.rstrip() + "\n")
    return folder / MODEL_CARD


def card_for(text: str, repository: str) -> str:
    """The card with the name of its repository in the example of use, unless somebody has edited that line."""
    return text.replace(LOCAL_ADAPTER, f"ADAPTER = {json.dumps(repository)}")


def card_values(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values that the template shows. run: run.json."""
    recipe, metrics, drift = run["recipe"], run["metrics"], run.get("drift")
    name = recipe["model"]["name"]
    commit = None if is_local_model(name) else (run.get("base") or {}).get("commit")
    base = name if commit else name_of_folder(name)
    sources = [source for source, _ in recipe["data"]["sources"]] or [recipe["data"]["source"]]
    licence = base_licence(name, commit)
    versions = run["versions"]
    return {
        "name": folder.absolute().name,
        "front_matter": front_matter(base if commit else None, [s for s in sources if not is_file(s)], licence, run),
        "base": base,
        "on_hub": commit is not None,
        "commit": commit,
        "base_in_words": f"[{base}](https://huggingface.co/{base})" if commit else f"a model in a folder `{base}`",
        "licence_in_words": _licence_in_words(base if commit else None, licence),
        "adapter_line": LOCAL_ADAPTER,
        "bits": recipe["model"]["bits"],
        "dtype": run["compute_dtype"],
        "has_template": (folder / "chat_template.jinja").exists(),
        "stop_ids": _stop_ids(folder / "generation_config.json"),
        "data": ", ".join(f"`{shared_name(source)}`" for source in sources),
        "recipe": recipe,
        "rope": run.get("rope"),  # which runs of earlier versions do not have
        "packed_rows": run["packed_rows"],
        "metrics": metrics,
        "kept_step": metrics.get("kept_step", metrics["steps"]),  # which runs of earlier versions do not have
        "made_with": ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl")),
        "preference": recipe.get("preference"),  # which runs of earlier versions do not have
        "held_out": metrics.get("held_out_preferences"),
        "drift": drift,
        "drift_source": drift and f"`{shared_name(drift['source'])}`",
    }


def front_matter(base: str | None, datasets: list[str], licence: dict[str, str], run: dict[str, Any]) -> str:
    """The card's YAML. The hub refuses ids that it does not have: a base and data of this machine are left out.

    base, datasets: ids on the hub.
    """
    return ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[*_tags(run["recipe"].get("preference")), *(["qlora"] if run["recipe"]["model"]["bits"] == 4 else [])],
        datasets=datasets or None,
        **licence,  # type: ignore[arg-type]
    ).to_yaml()


def _tags(preference: dict[str, Any] | None) -> list[str]:
    return TAGS if preference is None else [preference["loss"] if tag == "sft" else tag for tag in TAGS]


def shared_name(source: str) -> str:
    """A data source as others may read it: the id of a hub data set, or the names of files without their folders."""
    return names_without_folders(source) if is_file(source) else source


def is_local_model(name: str) -> bool:
    """Whether a base is named by its place on a disk, which may be gone. A snapshot in the hub's cache is one too."""
    return name.count("/") != 1 or name.startswith((".", "/", "~")) or local_path(name).is_dir()


def name_of_folder(path: str) -> str:
    """The last part of a local model's path, which alone others may read."""
    return Path(path).name if Path(path).name not in ("", "..") else local_path(path).resolve().name


def _licence_in_words(base: str | None, licence: dict[str, str]) -> str:
    page = f"https://huggingface.co/{base}" if base else None
    found = licence.get("license_name") or licence.get("license")
    if found:
        link = licence.get("license_link") or page
        return f"{found}" + (f" ({link})" if link else "")
    return f"see its page, {page}" if page else "see where it comes from"


def _stop_ids(path: Path) -> list[int]:
    """The ids that end an answer, by the generation config that the run saved."""
    found = read_object(path).get("eos_token_id") if path.exists() else None
    return [found] if isinstance(found, int) else found or []
