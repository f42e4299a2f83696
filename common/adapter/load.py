"""What a run left behind, found again: the adapter in its folder, the recipe that made it, and the base it belongs to.

Everything is checked before the base is looked for, so that what cannot work fails in a second and in one line.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from common.machine.disk import sha256_of
from common.model.integrity import check_complete
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec, UserError
from common.run.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_JSON


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter that is whole, with the recipe that it was trained with."""

    folder: Path
    recipe: Recipe  # the one that ran (run.json); for an adapter from elsewhere the one of the command
    config: LoraConfig
    run: dict[str, Any]  # run.json; empty for an adapter from elsewhere
    dtype: torch.dtype | None  # of the compute when it was trained; None where that is not known


def find_adapter(recipe: Recipe) -> TrainedAdapter:
    """The adapter in `recipe.out`. Raises UserError when it is missing, damaged, of another kind or of another base."""
    folder = Path(recipe.out)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: train first (make finetune), or name the run's: OUT=...")
    missing = next((name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()), None)
    if missing:
        raise UserError(f"{folder} has no adapter ({missing} is missing); a run leaves it when it ends")
    config = _read_config(folder / ADAPTER_CONFIG)
    check_complete(folder / ADAPTER_WEIGHTS)
    run = _read_run(folder / RUN_JSON)
    ran = recipe_of(run["recipe"], recipe) if run else recipe
    for trained_on in (config.base_model_name_or_path, ran.model.name):
        if trained_on and trained_on != recipe.model.name:
            raise UserError(
                f"the adapter in {folder} was trained on {trained_on}, and the recipe says {recipe.model.name}"
            )
    expected = run.get("adapter_sha256")
    if expected and expected != sha256_of(folder / ADAPTER_WEIGHTS):
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS} is damaged: it is not what the run wrote. Copy it again, or go back to a "
            f"checkpoint: make finetune ARGS=--resume (if you replaced it on purpose, remove {folder / RUN_JSON})"
        )
    return TrainedAdapter(folder, replace(ran, out=str(folder)), config, run, _dtype(run.get("compute_dtype")))


def recipe_of(values: dict[str, Any], default: Recipe) -> Recipe:
    """The recipe in run.json; fields of other versions are left out, and what it does not say is the default's."""

    def spec(kind: Any, name: str) -> Any:
        known = {field.name for field in fields(kind)}
        given = {key: value for key, value in values.get(name, {}).items() if key in known}
        return replace(getattr(default, name), **given)

    lora: LoraSpec = spec(LoraSpec, "lora")
    return replace(
        default,
        model=spec(ModelSpec, "model"),
        data=spec(DataSpec, "data"),
        lora=replace(lora, target_modules=tuple(lora.target_modules)),
        train=spec(TrainSpec, "train"),
    )


def _read_config(path: Path) -> LoraConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of an adapter: {error}") from error
    if kind != "LORA" or values.get("modules_to_save") or values.get("bias", "none") != "none":
        raise UserError(f"{path} describes more than LoRA on linear layers, or something else: {kind}")
    for key, types in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
        if not isinstance(values.get(key), types):
            raise UserError(f"{path} is not the configuration of an adapter: {key} is {values.get(key)!r}")
    try:
        return LoraConfig(**{key: value for key, value in values.items() if key in LoraConfig.__dataclass_fields__})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of an adapter: {error}") from error


def _read_run(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        run["recipe"]["model"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove it to use the adapter with the recipe's values") from error
    return dict(run)


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name) if name in ("bfloat16", "float16", "float32") else None
    assert dtype is None or isinstance(dtype, torch.dtype)
    return dtype


def trained_tokenizer(adapter: TrainedAdapter) -> PreTrainedTokenizerFast:
    """The tokenizer that the run saved, with its chat template; the base's for an adapter that came without one."""
    if (adapter.folder / "tokenizer.json").exists():
        return load_tokenizer(ModelSpec(str(adapter.folder)))
    return load_tokenizer(adapter.recipe.model)


def load_trained(adapter: TrainedAdapter) -> PeftModel:
    """The 4-bit base with the adapter on it, in eval mode; `disable_adapter()` gives the base.

    Raises UserError as load_4bit, and when adapter and base do not fit together.
    """
    model = load_4bit(adapter.recipe.model)
    peft_model = attach_adapter(model, adapter, model.device)
    saved = adapter.folder / "generation_config.json"
    if saved.exists():
        model.generation_config = GenerationConfig.from_pretrained(adapter.folder)
    use_lean_layers(peft_model, adapter.recipe.train.kernels)
    return peft_model.eval()


def attach_adapter(base: PreTrainedModel, adapter: TrainedAdapter, device: torch.device) -> PeftModel:
    """The base, which may be on meta, with the adapter on it: fp32, on `device`, frozen.

    Raises UserError unless each of the adapter's weights has its place, and each place its weight.
    """
    try:
        model = PeftModel(base, adapter.config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"the adapter in {adapter.folder} does not fit {adapter.recipe.model.name}: {error}") from error
    weights = {
        name: tensor.float() for name, tensor in load_file(adapter.folder / ADAPTER_WEIGHTS, str(device)).items()
    }
    places = {_saved_name(name): name for name in model.state_dict() if ".default" in name}
    wanted = {saved: model.get_parameter(name).shape for saved, name in places.items()}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    if shapes != wanted:
        odd = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))[0]
        raise UserError(
            f"the adapter in {adapter.folder} does not fit {adapter.recipe.model.name}: {odd} is "
            f"{_shape(shapes.get(odd))}, and the base needs {_shape(wanted.get(odd))}"
        )
    # Not PEFT's set_peft_model_state_dict: it moves the adapter to where the base is, which may be meta.
    model.load_state_dict({places[name]: tensor for name, tensor in weights.items()}, strict=False, assign=True)
    model.requires_grad_(False)
    return model


def _saved_name(name: str) -> str:
    """The name in adapter_model.safetensors of a parameter of the adapter "default"."""
    magnitude = ".lora_magnitude_vector.default.weight"  # DoRA's
    return name.removesuffix(".default.weight") if name.endswith(magnitude) else name.replace(".default", "")


def _shape(shape: torch.Size | None) -> str:
    return "not there" if shape is None else "x".join(map(str, shape))
