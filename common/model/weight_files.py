"""Which files of a model's folder are its weights. Whatever loads, checks, hashes or downloads weights asks here."""

import contextlib
import json
import re
from pathlib import Path

from common.recipe import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")  # as transformers names the files of an index


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the folder's weights, whether they are there or not.

    They are those that the index names, or model.safetensors where there is no index. Files with other names, such as
    consolidated.safetensors and model.fp16.safetensors, are never read. Raises UserError when the index is damaged, and
    when the folder holds more than one model: programs differ in which one they load.
    """
    named = _read_index(folder)
    if named is None:
        files = [SINGLE]
        others = sorted(path.name for path in folder.glob("*.safetensors") if SHARD.fullmatch(path.name))
        if others and not (folder / SINGLE).is_file():
            raise UserError(f"{folder} has {others[0]} and no {INDEX}: download that file too")
        origin, remedy = f"without a {INDEX}", "the others"
    else:
        files = named
        others = [] if SINGLE in named else named
        origin, remedy = f"that {INDEX} names", f"{INDEX} and its files"
    if others and (folder / SINGLE).is_file():
        there = "" if any((folder / name).is_file() for name in others) else ", not one of which is there"
        raise UserError(
            f"{folder} holds two models: {SINGLE}, and {_count(others)} {origin}{there}. Remove the one that is not "
            f"meant: {SINGLE}, or {remedy}"
        )
    _refuse_other_weights(folder)
    return files


def first_file(folder: Path) -> str:
    """The file by which transformers finds the weights: the index, or model.safetensors where there is none.

    As the config's `transformers_weights` it overrides transformers' own order, which is the other way round.
    """
    return INDEX if (folder / INDEX).is_file() else SINGLE


def _read_index(folder: Path) -> list[str] | None:
    """The files that the index names, sorted; None where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        odd = next((name for name in named if Path(name).name != name or not name.endswith(".safetensors")), None)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is damaged: {error}; download it again") from error
    if odd is not None or not named:
        raise UserError(f"{index} is damaged: {odd!r} is no safetensors file beside it; download it again")
    return named


def _refuse_other_weights(folder: Path) -> None:
    """Raises UserError for what makes transformers load something else, or more, than the folder's weights."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter too, which transformers would load onto the model: merge it, or remove "
            "adapter_config.json"
        )
    with contextlib.suppress(OSError, ValueError, AttributeError):  # load_config says what is wrong with the file
        other = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
        if other not in (None, first_file(folder)):
            raise UserError(
                f"{folder / 'config.json'} names {other} as the weights (transformers_weights), and only "
                f"{first_file(folder)} is read: remove that line, or rename the file"
            )


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
