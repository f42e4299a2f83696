"""Finds the adapter that a run left, and checks it against the recipe and the run's record.

All checks come before the base model is looked for: what cannot work fails in a second, before any download.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from common.machine.disk import sha256_of
from common.machine.paths import is_same_place
from common.model.adapter_config import read_adapter_config, stored_rope_scaling
from common.model.adapter_files import read_run_json, require_adapter_files
from common.model.integrity import check_complete
from common.recipe import DataSpec, LoraSpec, ModelSpec, PreferenceSpec, Recipe, TrainSpec, UserError
from common.run.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_JSON


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter whose files are complete, and what is known of its training."""

    folder: Path
    recipe: Recipe  # the one that ran, from run.json; the command's for an adapter that was trained elsewhere
    config: LoraConfig
    run: dict[str, Any]  # run.json; empty for an adapter that was trained elsewhere
    dtype: torch.dtype | None  # of the compute during training; None where it is not known


def find_adapter(recipe: Recipe) -> TrainedAdapter:
    """Finds the adapter in `recipe.out`.

    Raises UserError when it is missing or damaged, when it is more than LoRA, and when it belongs to another base.
    """
    folder = Path(recipe.out)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: train first (make finetune), or name the run's: OUT=...")
    require_adapter_files(folder)
    config = read_adapter_config(folder / ADAPTER_CONFIG)
    check_complete(folder / ADAPTER_WEIGHTS)
    run = read_run_json(folder / RUN_JSON)
    ran = recipe_from_run(run["recipe"], recipe) if run else recipe
    for trained_on in (config.base_model_name_or_path, ran.model.name):
        if trained_on and not is_same_place(trained_on, recipe.model.name):
            raise UserError(
                f"the adapter in {folder} was trained on {trained_on}, and the recipe says {recipe.model.name}: take "
                "the recipe of that base, or name the folder of another run: OUT=..."
            )
    commit = (run.get("base") or {}).get("commit")
    if commit:  # the branch that the recipe names may have moved on since
        ran = replace(ran, model=replace(ran.model, revision=commit))
    if not run and config.revision not in (None, recipe.model.revision or "main"):
        raise UserError(
            f"the adapter in {folder} was trained on the revision {config.revision} of {recipe.model.name}, "
            f"and the recipe says {recipe.model.revision or 'main'}: set ModelSpec.revision"
        )
    scaling = stored_rope_scaling(config)
    if scaling is not None and ran.model.rope_scaling != scaling:
        if run:
            raise UserError(
                f"{folder / ADAPTER_CONFIG} says rope_scaling {scaling}, and {RUN_JSON} beside it "
                f"{ran.model.rope_scaling}: one of the two is another run's, copy the folder again"
            )
        print(f"the adapter in {folder} was trained with ModelSpec(rope_scaling={scaling}), and gets that")
        ran = replace(ran, model=replace(ran.model, rope_scaling=scaling))
    expected = run.get("adapter_sha256")
    if expected and expected != sha256_of(folder / ADAPTER_WEIGHTS):
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS} is damaged: it is not what the run wrote. Copy it again, or go back to a "
            f"checkpoint: make finetune ARGS=--resume (if you replaced it on purpose, remove {folder / RUN_JSON})"
        )
    return TrainedAdapter(folder, replace(ran, out=str(folder)), config, run, _dtype(run.get("compute_dtype")))


def recipe_from_run(values: dict[str, Any], default: Recipe) -> Recipe:
    """Rebuilds the recipe that run.json holds as `values`.

    Fields that this version does not know, because another version wrote the file, are left out. Fields that are
    missing there keep the value of `default`, but for ModelSpec.rope_scaling, which such a run did not have.
    """
    values = values | {"model": {"rope_scaling": None} | values.get("model", {})}

    def known(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
        names = {field.name for field in fields(kind) if field.init}
        return {key: value for key, value in given.items() if key in names}

    def spec(kind: Any, name: str) -> Any:
        return replace(getattr(default, name), **known(kind, values.get(name, {})))

    lora: LoraSpec = spec(LoraSpec, "lora")
    preference = default.preference
    if "preference" in values:
        given = values["preference"]
        preference = given and PreferenceSpec(**known(PreferenceSpec, given))
    return replace(
        default,
        model=spec(ModelSpec, "model"),
        data=spec(DataSpec, "data"),
        lora=replace(lora, target_modules=tuple(lora.target_modules)),
        train=spec(TrainSpec, "train"),
        preference=preference,
    )


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name) if name in ("bfloat16", "float16", "float32") else None
    assert dtype is None or isinstance(dtype, torch.dtype)
    return dtype
