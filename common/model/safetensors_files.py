"""Checkpoints of many GiB in the memory of one tensor: safetensors folders, read and written tensor by tensor."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common.machine.disk import format_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Names of safetensors' format (huggingface.co/docs/safetensors, "Format") that a checkpoint of ours may hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9  # of the shards that transformers writes


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file and what it holds, in its order."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        return len(self.header()) + sum(entry.size for entry in self.entries)

    def header(self) -> bytes:
        """What the file begins with: a length of eight bytes, then JSON, padded with spaces to a multiple of eight."""
        head: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for entry in self.entries:
            place = [at, at + entry.size]
            head[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
            at += entry.size
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class Shards:
    """The tensors of a model's folder; the files must be complete (common.model.files.check_safetensors)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = [SINGLE]
        self.shards, self.places = [], dict[str, tuple[Path, int]]()
        for file in files:
            start, entries = _read_header(folder / file)
            self.shards.append(Shard(file, tuple(entries)))
            for entry in entries:
                self.places[entry.name] = folder / file, start
                start += entry.size
        self.entries = {entry.name: entry for shard in self.shards for entry in shard.entries}

    def read(self, name: str, rows: slice | list[int] | None = None) -> Tensor:
        """A tensor, or rows of it (a slice without a step), as it is stored, on the CPU.

        Read, not mapped: what a mapped file has shown counts as memory of the process, beside the copy of it.
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


def _read_header(path: Path) -> tuple[int, list[Entry]]:
    """Where the data begins, and the tensors in their order there; they lie side by side."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    parts = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return 8 + length, [Entry(name, DTYPES[part["dtype"]], tuple(part["shape"])) for name, part in parts]


def split(entries: list[Entry]) -> list[Shard]:
    """Entries laid into files of at most MAX_SHARD_BYTES, in their order, named as transformers names them."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(e.size for e in groups[-1]) + entry.size > MAX_SHARD_BYTES:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def write_shards(
    folder: Path, shards: list[Shard], tensor_of: Callable[[Entry], Tensor], say: Callable[[str], None] = print
) -> None:
    """Every shard, and the index of several; `tensor_of` gives each tensor when its turn comes, in any float dtype."""
    for number, shard in enumerate(shards, 1):
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header())
            for entry in shard.entries:
                tensor = tensor_of(entry).to("cpu", entry.dtype).contiguous()
                if tuple(tensor.shape) != entry.shape:
                    raise RuntimeError(f"{entry.name} is {tuple(tensor.shape)}, not {entry.shape}")
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
        say(f"  {shard.file}: {format_bytes(shard.size)} ({number} of {len(shards)})")
    if len(shards) > 1:
        total = sum(entry.size for shard in shards for entry in shard.entries)
        places = {entry.name: shard.file for shard in shards for entry in shard.entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def in_16_bits(shards: list[Shard], dtype: torch.dtype) -> list[Shard]:
    """The same layout, with `dtype` for tensors of more than 16 bits."""
    return [
        replace(
            shard,
            entries=tuple(
                replace(entry, dtype=dtype) if entry.dtype in (torch.float32, torch.float64) else entry
                for entry in shard.entries
            ),
        )
        for shard in shards
    ]
