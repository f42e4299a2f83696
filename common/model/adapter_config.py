"""Reads adapter_config.json, and refuses what is more than LoRA on linear layers.

PEFT keeps many methods under the name LORA, each behind a field of its LoraConfig. So every field is looked up in a
list of those that are known: what it may say, or that it says nothing of a trained adapter. A field that is in no list,
which may be one of a later PEFT, has to be off.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from common.recipe import UserError
from common.rope_scaling import plain_numbers, wrong_rope_scaling

# What a trained adapter computes: the types that these fields of PEFT's LoraConfig (0.21) have in the file.
_SUPPORTED: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "exclude_modules": (list, str, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
}
_NEEDED = ("r", "lora_alpha", "target_modules")
# How the adapter was trained, or made before that. init_lora_weights says whether that changed the base.
_OF_TRAINING = {
    *("auto_mapping", "inference_mode", "lora_dropout", "peft_version", "runtime_config"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"),
    "ensure_weight_tying",  # of modules_to_save and trainable_token_indices
    "fan_in_fan_out",  # of Conv1D layers; PEFT ignores it for nn.Linear
    "megatron_core",  # used with megatron_config
    "qalora_group_size",  # used with use_qalora
}
# What an adapter may have been initialised with: these leave the base as it is, and the trained A and B say the rest.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")
_UNUSED: tuple[Any, ...] = (None, False, [], {})  # what a field that is not used holds

MERGE_WITH_PEFT = (
    "merge it with PEFT (PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder))"
)
_USE_PEFT = "it cannot be merged: use it with PEFT"
_WHY_NOT = {
    "modules_to_save": f"it holds whole layers of the model; {MERGE_WITH_PEFT}",
    "trainable_token_indices": f"it holds rows of the embedding; {MERGE_WITH_PEFT}",
    "lora_bias": f"it has biases; where the layers of the base have them too, {MERGE_WITH_PEFT}; else {_USE_PEFT}",
    "bias": f"it holds biases of the base; {MERGE_WITH_PEFT}",
    "target_parameters": f"it changes parameters outside linear layers; {MERGE_WITH_PEFT}",
    "kasa_config": f"it changes the base; {MERGE_WITH_PEFT}",
    "use_bdlora": f"its matrices are cut into blocks; {MERGE_WITH_PEFT}",
    "monteclora_config": f"it adds noise of its own; {MERGE_WITH_PEFT}",
    "alora_invocation_tokens": f"it acts on some tokens of a text alone; {_USE_PEFT}",
    "arrow_config": f"it is chosen for each token; {_USE_PEFT}",
    "layer_replication": f"it repeats layers of the base; {_USE_PEFT}",
    "megatron_config": "it is of a Megatron model; convert it to one of transformers",
    "use_qalora": "it belongs to a GPTQ model; use it with PEFT",
}


@dataclass
class ScaledLoraConfig(LoraConfig):
    """Of an adapter whose base has another RoPE than its own config.json says. PEFT writes the field with the others.

    Plain PEFT leaves it aside when it loads the adapter, with a warning that names it.
    """

    rope_scaling: dict[str, Any] | None = None  # ModelSpec's


def stored_rope_scaling(config: LoraConfig) -> dict[str, Any] | None:
    """The RoPE scaling that an adapter was trained with, where its own configuration says one."""
    return config.rope_scaling if isinstance(config, ScaledLoraConfig) else None


def read_adapter_config(path: Path) -> LoraConfig:
    """The configuration of an adapter that is LoRA, DoRA or rsLoRA on linear layers.

    Raises UserError for a file that is no configuration, and for an adapter that is anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of an adapter: {error}") from error
    if kind != "LORA":
        raise UserError(f"{path} describes an adapter of the type {kind}, which is not LoRA; {MERGE_WITH_PEFT}")
    if values.get("task_type") not in ("CAUSAL_LM", None):
        raise UserError(f"{path} describes an adapter of a model for {values['task_type']}, not for CAUSAL_LM")
    _refuse_other_inits(path, values.get("init_lora_weights", True))
    for field, value in values.items():
        if field in _SUPPORTED:
            _require_type(path, field, value)
        elif field == "rope_scaling" and value is not None:
            if (message := wrong_rope_scaling(value, f"{path}: rope_scaling")) is not None:
                raise UserError(message)
        elif field not in {*_OF_TRAINING, "peft_type", "task_type", "init_lora_weights"} and not _is_off(field, value):
            _refuse(path, field, value)
    for field in _NEEDED:
        _require_type(path, field, values.get(field))
    given = {field: values[field] for field in _SUPPORTED if values.get(field) is not None}
    try:
        if (scaling := values.get("rope_scaling")) is not None:
            return ScaledLoraConfig(
                task_type="CAUSAL_LM", inference_mode=True, rope_scaling=plain_numbers(scaling), **given
            )
        return LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **given)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of an adapter: {error}") from error


def _refuse_other_inits(path: Path, init: Any) -> None:
    if any(init is plain if isinstance(plain, bool) else init == plain for plain in _PLAIN_INITS):
        return
    if isinstance(init, str) and init.lower().startswith(_CONVERTIBLE_INITS):
        remedy = "save it once more with save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        raise UserError(
            f"{path} says init_lora_weights={init!r}, which changed the weights of the base as well: convert the "
            f"adapter to LoRA with PEFT ({remedy}), or {MERGE_WITH_PEFT}"
        )
    raise UserError(
        f"{path} says init_lora_weights={init!r}, which may have changed the weights of the base as well: "
        f"{MERGE_WITH_PEFT}"
    )


def _require_type(path: Path, field: str, value: Any) -> None:
    types = _SUPPORTED[field]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UserError(f"{path} is not the configuration of an adapter: {field} is {value!r}")


def _is_off(field: str, value: Any) -> bool:
    return (field, value) == ("bias", "none") or any(type(value) is type(off) and value == off for off in _UNUSED)


def _refuse(path: Path, field: str, value: Any) -> None:
    """Raises UserError for a field that makes the adapter more than LoRA, or that is not known."""
    said = json.dumps(value, ensure_ascii=False)
    said = said if len(said) <= 60 else f"{said[:60]}…"
    if field in _WHY_NOT:
        raise UserError(f"{path} says {field}={said}, so the adapter is more than LoRA: {_WHY_NOT[field]}")
    raise UserError(
        f"{path} says {field}={said}, a field that is not known here and may change what the adapter means: "
        f"{MERGE_WITH_PEFT}; if it says nothing, remove it from the file"
    )
