"""The RoPE of a model: the recipe's scaling in config.json's own form, and the positions that it gives.

transformers 5.23 (modeling_rope_utils.py): linear, yarn and llama3 compute their frequencies once, from the config, and
of it read no max_position_embeddings. dynamic and longrope compute them anew, by the longest row that has run: those of
dynamic then stay until a row below the model's own positions comes. So a row's numbers depend on other rows, and the
two are trained only up to the positions below which nothing changes.
"""

import math
from copy import deepcopy
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from common.recipe import ModelSpec, UserError
from common.rope_scaling import ORIGINAL, needed_keys

NAME = "ModelSpec.rope_scaling"
CHANGING = ("dynamic", "longrope")  # kinds whose frequencies depend on the longest row


def full_rope(config: PretrainedConfig) -> dict[str, Any]:
    """The RoPE of layers that attend to everything; Gemma's others have one of their own."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def original_positions(config: PretrainedConfig) -> int:
    """Positions before the model's own RoPE was scaled."""
    rope, positions = full_rope(config), config.max_position_embeddings
    if rope["rope_type"] == "linear":
        return round(positions / rope["factor"])
    return int(rope.get(ORIGINAL) or positions)


def usable_positions(config: PretrainedConfig) -> int:
    """Tokens of the longest row that can be trained, or read in an answer."""
    rope, positions = full_rope(config), int(config.max_position_embeddings)
    if rope["rope_type"] == "yarn":  # Qwen's documentation adds it to config.json and leaves max_position_embeddings
        return max(positions, int((rope["factor"] or 1) * original_positions(config)))
    return original_positions(config) if rope["rope_type"] in CHANGING else positions


def with_rope_scaling(values: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The values of a config.json with the recipe's scaling and the positions it gives; as they are where it has none.

    They keep the file's form: `rope_scaling` beside `rope_theta`, or transformers 5's `rope_parameters`. Of a Gemma the
    layers that attend to everything are scaled. Raises UserError where the scaling does not fit the model.
    """
    if spec.rope_scaling is None:
        return values
    own, scaling = AutoConfig.for_model(**deepcopy(values)), dict(spec.rope_scaling)
    positions = _scaled_positions(spec, own)
    if "full_attention" in own.rope_parameters and "truncate" in scaling:
        raise UserError(f"{NAME} has truncate, which transformers does not read for {spec.name}; leave it out")
    theta = scaling.pop("rope_theta", full_rope(own)["rope_theta"])
    values = deepcopy(values) | {"max_position_embeddings": positions}
    values.pop(ORIGINAL, None)  # it would win over the scaling's own
    if rope := values.get("rope_parameters"):
        values.pop("rope_scaling", None)
        scaling = {"rope_theta": theta} | scaling
        values["rope_parameters"] = rope | {"full_attention": scaling} if "full_attention" in rope else scaling
    else:
        values |= {"rope_scaling": scaling, "rope_theta": theta}
    return values


def _scaled_positions(spec: ModelSpec, own: PretrainedConfig) -> int:
    """factor * the positions that are scaled; of dynamic, which reads them as those that it scales, these alone."""
    assert spec.rope_scaling is not None
    kind, factor = spec.rope_scaling["rope_type"], spec.rope_scaling["factor"]
    original = spec.rope_scaling.get(ORIGINAL, original_positions(own))
    if original > own.max_position_embeddings:
        raise UserError(
            f"{NAME}: {ORIGINAL} is {original:,}; {spec.name} has {own.max_position_embeddings:,} positions"
        )
    if kind == "dynamic":
        return int(original)
    positions = int(factor * original)
    if positions <= usable_positions(own):
        raise UserError(
            f"{NAME} gives {positions:,} positions (factor {factor:g} × {original:,}), and {spec.name} has "
            f"{usable_positions(own):,} without it: leave it out, or take a larger factor"
        )
    return positions


def keep_frequencies(model: PreTrainedModel) -> None:
    """A RoPE whose frequencies would change with the longest row keeps those that it has; any other stays as it is.

    Up to usable_positions they are the same. A plan's tensors have no values to ask for the longest row, and on a GPU
    each forward pass would wait for the answer.
    """
    rope = model.base_model.rotary_emb
    if isinstance(rope.rope_type, dict):  # Gemma's, by the kind of layer
        rope.rope_type = {layers: _lasting(kind) for layers, kind in rope.rope_type.items()}
    else:
        rope.rope_type = _lasting(rope.rope_type)


def _lasting(kind: str) -> str:
    return "default" if kind in CHANGING else kind


def longer_rows(seq_len: int, config: PretrainedConfig) -> str:
    """How a recipe gets rows of seq_len tokens out of the model, in words. config: with the recipe's own scaling."""
    rope, original = full_rope(config), original_positions(config)
    factor = math.ceil(seq_len / original)
    kind = rope["rope_type"]
    if kind in ("linear", "yarn", "llama3"):
        scaling = {key: rope[key] for key in needed_keys(kind)} | {"factor": float(factor)}
    elif "full_attention" in config.rope_parameters:  # Gemma's larger models are scaled this way
        scaling = {"rope_type": "linear", "factor": float(factor)}
    else:
        scaling = {"rope_type": "yarn", "factor": float(factor), ORIGINAL: original}
    why = f"its {kind} RoPE changes with the longest row beyond them, so no row would be trained alone. " * (
        kind in CHANGING
    )
    return f"{why}ModelSpec(rope_scaling={scaling}) gives {factor * original:,} (docs/long_rows.md)"
