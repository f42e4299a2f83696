"""Values of a recipe's fields that are typed with a command: SET="train.learning_rate=1e-4 lora.rank=64"."""

import argparse
import shlex
import types
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal, Union, get_args, get_origin

from common.recipe import SPECS, Recipe, UserError, fields_of_specs
from common.recipe_fields import unknown_field

PARTS = tuple(part for part in SPECS if part)
# Fields of a recipe itself that have a variable or a flag of their own.
ELSEWHERE = {"out": "OUT=...", "existing_run": "ARGS=--resume or ARGS=--overwrite"}
# Flags of commands that set fields too, with what is typed at make.
TYPED_ELSEWHERE = {
    "data": ("DATA=", [f"data.{name}" for name in ("source", "sources", "eval_source", "revision", "config")]),
    "max_steps": ("--max-steps", ["train.max_steps"]),
    "seq_len": ("SEQ_LEN=", ["train.seq_len"]),
    "card_gib": ("CARD_GIB=", ["card_gib"]),
    "layers": ("LAYERS=", ["model.layers"]),
}
_HOW = 'write a field and its value: SET="train.seed=2 lora.rank=64"'
_TRUTH = {"True": True, "true": True, "False": False, "false": False}


def set_fields(recipe: Recipe, text: str, parts: Sequence[str] = tuple(SPECS)) -> Recipe:
    """The recipe with the values of `text`, words as of a shell: part.field=value, or field=value of the recipe itself.

    A value is read as the field's type says. None, where the field may be None, is the word None. Names of modules are
    divided by commas, and so are pairs: data.sources=a.jsonl:0.8,b.jsonl:0.2 data.columns=user:frage,assistant:antwort
    model.rope_scaling=rope_type:yarn,factor:4,original_max_position_embeddings:32768.
    parts: those that may be set. Raises UserError for a field that is not there, and as the recipe's own checks.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"SET is {text!r}, which has a quotation mark without its end") from error
    given: dict[str, dict[str, Any]] = {}
    for word in words:
        name, is_word, value = word.partition("=")
        part, _, field = name.rpartition(".")
        if not is_word or part not in ("", *PARTS) or not field:
            raise UserError(f"SET has {word!r}; {_HOW}, with {', '.join(PARTS)} before the dot")
        if part not in parts:
            raise UserError(f"SET has {name}, and this command takes what the run recorded: only model.… can be set")
        kinds = {entry.name: entry.type for entry in fields(SPECS[part]) if entry.init}
        if not part and (field in PARTS or field in ELSEWHERE):
            instead = ELSEWHERE.get(field, f'a field of it: SET="{field}.name=value"')
            raise UserError(f"SET has {field}, which is given as {instead}")
        if field not in kinds:
            raise UserError(f"SET: {unknown_field(SPECS[part].__name__, field, fields_of_specs())}")
        if field in given.setdefault(part, {}):
            raise UserError(f"SET has {name} twice")
        given[part][field] = read_value(value, kinds[field])
    changed = {part: _with_values(getattr(recipe, part), part, values) for part, values in given.items() if part}
    return replace(recipe, **changed, **given.get("", {}))


def _with_values(spec: Any, part: str, values: dict[str, Any]) -> Any:
    """The spec with the values. A recipe without a PreferenceSpec gets one, with the defaults of its loss."""
    return SPECS[part](**values) if spec is None else replace(spec, **values)


def refuse_typed_twice(flags: argparse.Namespace) -> None:
    """Raises UserError where --set has a field that another flag of the same command line sets too."""
    names = [word.partition("=")[0] for word in flags.set.split()]
    for flag, (variable, fields_of_flag) in TYPED_ELSEWHERE.items():
        twice = [name for name in names if name in fields_of_flag]
        if getattr(flags, flag, None) is not None and twice:
            raise UserError(f"SET has {twice[0]}, and so has {variable}; give one of the two")


def _pairs(text: str) -> list[tuple[str, str, str]]:
    return [pair.rpartition(":") for pair in text.split(",") if pair]


def read_value(text: str, kind: Any) -> Any:
    """The value that was typed for a field of type `kind`. What it cannot be read as stays a text, which the field's
    own check refuses with what it wants."""
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if type(None) in choices and text == "None":
        return None
    for choice in choices:
        if choice is bool and text in _TRUTH:
            return _TRUTH[text]
        if choice in (int, float):
            try:
                return choice(text)
            except ValueError:
                continue
        if get_origin(choice) is tuple and get_args(choice) == (str, ...):
            return tuple(name for name in text.split(",") if name)
        if choice == dict[str, str]:
            return {key: value for key, _, value in _pairs(text)}
        if choice == dict[str, Any]:
            return {key: read_value(value, bool | int | float | str) for key, _, value in _pairs(text)}
        if choice == tuple[tuple[str, float], ...]:
            return tuple((source, read_value(weight, float)) for source, _, weight in _pairs(text))
        if choice is str or get_origin(choice) is Literal:
            return text
    return text
