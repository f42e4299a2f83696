"""Reads a model's config.json, and refuses architectures and quantizations that the recipes do not fine-tune."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from common import REPOSITORY
from common.machine.paths import local_path
from common.model.architectures import ARCHITECTURES
from common.model.download import model_folder
from common.model.quantization import refuse_other_quantization
from common.model.rope_scaling import longer_rows, usable_positions, with_rope_scaling
from common.recipe import LoraSpec, ModelSpec, Recipe, UserError

# Fields of a config that change the forward pass and that nothing here reads, with the values that change nothing.
NOT_HANDLED: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),  # the loss reads logits as the head gives them
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),  # EmbeddingGemma; attention here is causal
}
SHIPPED_CONFIGS = REPOSITORY / "models" / "configs"  # of the recipes' models, so that a plan needs no network


def load_config(spec: ModelSpec, folder: Path | None = None) -> PretrainedConfig:
    """The model's config: from `folder` where given, else from its own folder, models/configs (no network), or the hub.

    With the recipe's RoPE scaling. Raises UserError for an architecture that is not one of ARCHITECTURES, for a field
    of NOT_HANDLED, for a config that cannot be read, and as with_rope_scaling and refuse_other_quantization.
    """
    shipped = SHIPPED_CONFIGS / (spec.name.replace("/", "--") + ".json")
    if folder is None and shipped.exists() and not local_path(spec.name).is_dir():
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
    if f"{model_type}_text" in ARCHITECTURES:
        raise UserError(
            f"{spec.name} reads pictures too (type {model_type!r}), and the recipes train text alone: write its text "
            f"part to a folder, as docs/new_architecture.md shows, and take that"
        )
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{spec.name} is of type {model_type!r}; the recipes fine-tune {', '.join(ARCHITECTURES)} models"
        )
    config = AutoConfig.for_model(**deepcopy(with_rope_scaling(values, spec)))  # transformers writes into its values
    for field, neutral in NOT_HANDLED.items():
        if (value := getattr(config, field, None)) not in neutral:
            raise UserError(f"{spec.name} has {field} {value!r} in its config.json, which no code here handles")
    refuse_other_quantization(spec, config)
    if spec.layers is not None:
        config.num_hidden_layers = min(spec.layers, config.num_hidden_layers)
        kinds = getattr(config, "layer_types", None)
        config.layer_types = _first_layers(kinds, config.num_hidden_layers) if kinds else None
    return config


def _first_layers(kinds: list[str], layers: int) -> list[str]:
    """The kinds of the first layers. A kind that only later layers have takes the last one's place: a plan counts what
    each kind makes for itself, such as Gemma's two RoPEs."""
    first = kinds[:layers]
    later = next((kind for kind in kinds if kind not in first), None)
    return [*first[:-1], later] if later and layers > 1 else first


def head_dim_of(config: PretrainedConfig) -> int:
    """The numbers of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def lora_parameters(config: PretrainedConfig, lora: LoraSpec) -> int:
    """Elements of the matrices A and B on all decoder layers: rank * (inputs + outputs) for each target module.

    The models of ARCHITECTURES have the same seven linear layers. A target of another name, which attach_lora refuses,
    counts nothing.
    """
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, head_dim_of(config)
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    width_of = {  # inputs + outputs
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + config.intermediate_size),
    }
    widths = sum(width_of.get(target, 0) for target in set(lora.target_modules))
    return int(config.num_hidden_layers * lora.rank * widths)


def refuse_other_shape(spec: ModelSpec, name: str, stored: torch.Size, config_shape: torch.Size) -> None:
    """Raises UserError when a stored tensor, or the weight of a layer, has another shape than the config says."""
    if stored != config_shape:
        raise UserError(
            f"{spec.name} does not fit its config.json: {name} is {tuple(stored)}, the config says "
            f"{tuple(config_shape)}"
        )


def refuse_more_positions(recipe: Recipe) -> None:
    """Raises UserError when a row is longer than the model can tell positions apart."""
    seq_len, config = recipe.train.seq_len, load_config(recipe.model)
    positions = usable_positions(config)
    if seq_len > positions:
        raise UserError(
            f"TrainSpec.seq_len is {seq_len:,}; {recipe.model.name} has {positions:,} positions. For longer rows: "
            f"{longer_rows(seq_len, config)}"
        )
