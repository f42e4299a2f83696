"""What is wrong with a recipe's RoPE scaling, in words: the keys that each kind has, in transformers' names.

Keys and meanings: transformers 5.23, modeling_rope_utils.py. Standard library only.
"""

import difflib
import math
from typing import Any

from common.recipe_fields import wrong_type

ORIGINAL = "original_max_position_embeddings"
EXAMPLE = '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}'
# By rope_type the keys that it needs and those that it may have beside them, each with its type.
_KEYS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "linear": ({"factor": float}, {}),
    "dynamic": ({"factor": float}, {}),
    "yarn": (
        {"factor": float, ORIGINAL: int},
        {
            **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), float),
            "truncate": bool,
        },
    ),
    "llama3": ({"factor": float, "low_freq_factor": float, "high_freq_factor": float, ORIGINAL: int}, {}),
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}  # transformers'
_ALWAYS_OPTIONAL = {"rope_theta": float}


def wrong_rope_scaling(values: Any, name: str) -> str | None:
    """Why `values` is no RoPE scaling that can be trained; None where it is one. name: of the field."""
    if not isinstance(values, dict):
        return f"{name} is {values!r:.80}; give a dict: {EXAMPLE}"
    kind, choices = values.get("rope_type"), ", ".join(map(repr, _KEYS))
    if "rope_type" not in values:
        instead = "it is what type is here" if "type" in values else f"give one of {choices}"
        return f"{name} has no rope_type; {instead}"
    if not isinstance(kind, str) or kind not in _KEYS:
        return f"{name}: rope_type is {kind!r}; choose one of {choices}, or None for the model's own"
    needed, optional = _KEYS[kind]
    types = needed | optional | _ALWAYS_OPTIONAL
    for key in values:
        if key != "rope_type" and key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            return f"{name} has {key!r}; " + (f"do you mean {close[0]}?" if close else f"{kind} has {', '.join(types)}")
    if missing := [key for key in needed if key not in values]:
        return f"{name} needs {' and '.join(missing)}: rope_type is {kind!r}"
    for key, value in values.items():
        if key == "rope_type":
            continue
        if (message := wrong_type(value, types[key], f"{name}: {key}")) is not None:
            return message
        if types[key] is not bool and not 0 < value < math.inf:
            return f"{name}: {key} is {value}; it must be above 0, and finite"
    return _out_of_range(values, name)


def _out_of_range(values: dict[str, Any], name: str) -> str | None:
    if values["factor"] <= 1:
        return (
            f"{name}: factor is {values['factor']}; it must be above 1, None leaves the model's positions as they are"
        )
    for high, low in (("high_freq_factor", "low_freq_factor"), ("beta_fast", "beta_slow")):
        if {high, low} & values.keys():
            above, below = (values.get(key, _YARN_DEFAULTS.get(key, 0.0)) for key in (high, low))
            if above <= below:
                return f"{name}: {high} is {above} and {low} is {below}; {high} must be the larger one"
    if ("mscale" in values) != ("mscale_all_dim" in values):
        return f"{name} has one of mscale and mscale_all_dim; give both, one alone does nothing"
    if "mscale" in values and "attention_factor" in values:
        return f"{name} has attention_factor, beside which mscale and mscale_all_dim do nothing; leave them out"
    return None


def needed_keys(kind: str) -> list[str]:
    """The keys without which there is no RoPE of the kind; none for a kind that is not trained."""
    return ["rope_type", *_KEYS[kind][0]] if kind in _KEYS else []


def plain_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """A copy with its keys in one order, and whole numbers as floats where the key's type is float."""
    needed, optional = _KEYS[values["rope_type"]]
    types = {"rope_type": str} | needed | optional | _ALWAYS_OPTIONAL
    return {key: float(values[key]) if types[key] is float else values[key] for key in types if key in values}
