"""Refuses weights that are missing, pickled, cut short or damaged, before anything is loaded."""

from collections.abc import Iterable
from pathlib import Path

from common.model.file_hash import hub_sha256, remembered_sha256
from common.model.safetensors_files import read_header, tensor_names
from common.model.weight_files import INDEX, SINGLE, weight_files
from common.recipe import ModelSpec, UserError


def check_safetensors(folder: Path) -> None:
    """Raises UserError unless the folder holds one model, in complete safetensors files, and as the hub has them."""
    files = weight_files(folder)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing == [SINGLE] and not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise UserError(
                f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are opened; "
                "take a model with safetensors, or convert it: https://huggingface.co/spaces/safetensors/convert"
            )
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise UserError(
            f"{folder} has no weights: there is no {SINGLE} and no {INDEX}"
            + (f"; {others[0]} is another format or variant" if others else "")
        )
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(files)} weight files, first {missing[0]}")
    place_of: dict[str, str] = {}
    for file in files:
        tensors = check_complete(folder / file)
        _check_content(folder / file)
        for tensor in tensors:
            if tensor in place_of:
                raise UserError(f"{folder} holds {tensor} twice, in {place_of[tensor]} and {file}: download it again")
            place_of[tensor] = file


def refuse_other_names(spec: ModelSpec, folder: Path, names: Iterable[str]) -> None:
    """Raises UserError unless the folder's files have a tensor for each of a model's parameters under its own name.

    transformers loads some other names too, such as those without "model." at the front; nothing else here does.
    """
    missing = sorted(set(names) - tensor_names(folder))
    if missing:
        raise UserError(
            f"{spec.name} has no tensor {missing[0]}, and {len(missing) - 1} more are missing or have other names than "
            "transformers writes: load it with transformers and save it again"
        )


def check_complete(path: Path) -> list[str]:
    """The names of the file's tensors. Raises UserError unless it is as long as its safetensors header says."""
    size = path.stat().st_size
    again = "delete it and download it again"
    try:
        start, entries = read_header(path)
        data_bytes = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except EOFError as error:
        raise UserError(f"{path} is cut short: {size:,} bytes, less than its header; {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file, or its header is damaged; {again}") from error
    expected = start + data_bytes
    if size != expected:
        raise UserError(f"{path} is cut short or damaged: {size:,} bytes instead of {expected:,}; {again}")
    return list(entries)


def _check_content(path: Path) -> None:
    """Raises UserError unless a file in the hub's cache has the sha256 that the hub gave it as its name."""
    expected = hub_sha256(path)
    if expected is not None and remembered_sha256(path) != expected:
        raise UserError(f"{path} is damaged: it is not what the hub has. Delete {path.resolve()} and run again")
