"""Reads and writes the safetensors files of a model, tensor by tensor: many GiB in the memory of one tensor.

A model is one file, or several with an index that says which tensor lies in which file. transformers calls those
files "shards"; here *shard* is what FSDP2 makes of a layer (common.model.sharding).
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.machine.disk import format_bytes
from common.model.weight_files import INDEX, SINGLE, weight_files

# Names of safetensors' format (huggingface.co/docs/safetensors, "Format") that a model of ours may hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "I8": torch.int8,
}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}
MAX_FILE_BYTES = 5 * 10**9  # as transformers writes them


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class SafetensorsFile:
    """A file, and the tensors in it in their order."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes, with the header."""
        return len(self.header()) + sum(entry.size for entry in self.entries)

    def header(self) -> bytes:
        """What the file begins with: a length of eight bytes, then JSON, padded with spaces to a multiple of eight."""
        head: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for entry in self.entries:
            offsets = [at, at + entry.size]
            head[entry.name] = {
                "dtype": NAME_OF_DTYPE[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": offsets,
            }
            at += entry.size
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class SafetensorsFolder:
    """The tensors of a model's folder. Its files must be complete: common.model.integrity.check_safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files, self.places = [], dict[str, tuple[Path, int]]()
        for file in weight_files(folder):
            start, header = read_header(folder / file)
            entries = [Entry(name, DTYPES[part["dtype"]], tuple(part["shape"])) for name, part in header.items()]
            self.files.append(SafetensorsFile(file, tuple(entries)))
            for entry in entries:
                self.places[entry.name] = folder / file, start
                start += entry.size
        self.entries = {entry.name: entry for file in self.files for entry in file.entries}

    def read(self, name: str, rows: slice | list[int] | None = None) -> Tensor:
        """A tensor, or rows of it (a slice without a step), as it is stored, on the CPU.

        The file is read and not mapped: the pages of a mapped file count as memory of the process, beside the copy.
        """
        entry, (path, start) = self.entries[name], self.places[name]
        if rows is None:
            return _read(path, start, entry)
        count = entry.shape[0]
        if isinstance(rows, slice):
            first, last, _ = rows.indices(count)
            part = replace(entry, shape=(last - first, *entry.shape[1:]))
            return _read(path, start + first * (entry.size // count), part)
        row = replace(entry, shape=(1, *entry.shape[1:]))
        return torch.cat([_read(path, start + index * row.size, row) for index in rows])


def _read(path: Path, offset: int, entry: Entry) -> Tensor:
    buffer = bytearray(entry.size)
    with path.open("rb") as file:
        file.seek(offset)
        file.readinto(buffer)
    return torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the data of a file begins, in bytes, and the header's entry of each tensor, in the order of the data.

    An entry has "dtype" (a key of DTYPES), "shape" and "data_offsets". The tensors lie side by side. Raises EOFError
    when the file is shorter than its header, and ValueError, KeyError, TypeError or AttributeError when the header is
    damaged.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise EOFError(path)
        (length,) = struct.unpack("<Q", prefix)
        if 8 + length > path.stat().st_size:
            raise EOFError(path)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in the folder's files, which must be complete."""
    return {tensor for file in weight_files(folder) for tensor in read_header(folder / file)[1]}


def split_into_files(entries: list[Entry]) -> list[SafetensorsFile]:
    """Files of at most MAX_FILE_BYTES with the entries in their order, named as transformers names them."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(e.size for e in groups[-1]) + entry.size > MAX_FILE_BYTES:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        return [SafetensorsFile(SINGLE, tuple(groups[0]))]
    return [
        SafetensorsFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def write_files(
    folder: Path, files: list[SafetensorsFile], tensor_of: Callable[[Entry], Tensor], say: Callable[[str], None] = print
) -> None:
    """Writes every file, and the index of several. tensor_of: gives each tensor in turn, in any float dtype.

    Raises RuntimeError when a tensor has another shape than its entry.
    """
    for number, layout in enumerate(files, 1):
        with (folder / layout.name).open("wb") as file:
            file.write(layout.header())
            for entry in layout.entries:
                tensor = tensor_of(entry).to("cpu", entry.dtype).contiguous()
                if tuple(tensor.shape) != entry.shape:
                    raise RuntimeError(f"{entry.name} is {tuple(tensor.shape)}, not {entry.shape}")
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
        say(f"  {layout.name}: {format_bytes(layout.size)} ({number} of {len(files)})")
    if len(files) > 1:
        total = sum(entry.size for layout in files for entry in layout.entries)
        places = {entry.name: layout.name for layout in files for entry in layout.entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def narrow_to_16_bits(files: list[SafetensorsFile], dtype: torch.dtype) -> list[SafetensorsFile]:
    """The same files, with `dtype` for the floating tensors of 32 and 64 bits."""
    return [
        replace(
            file,
            entries=tuple(
                replace(entry, dtype=dtype) if entry.dtype in (torch.float32, torch.float64) else entry
                for entry in file.entries
            ),
        )
        for file in files
    ]
