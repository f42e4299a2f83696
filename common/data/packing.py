"""Examples laid into packed rows, and packed rows into micro-batches."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.nn.functional import pad
from trl import pack_dataset

from common.data.chat_format import Tokens
from common.data.labels import IGNORED, trained_positions

Batch = dict[str, Any]  # a micro-batch, as collate makes it


class Examples:
    """Tokenised examples in 8 bytes a token: Python's own lists take ten times that."""

    def __init__(self, examples: Iterable[Tokens] = ()) -> None:
        self.input_ids, self.labels, self.ends = array("i"), array("i"), array("i", [0])
        for example in examples:
            self.append(example)

    def append(self, example: Tokens) -> None:
        self.input_ids.extend(example.input_ids)
        self.labels.extend(example.labels)
        self.ends.append(len(self.input_ids))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Tokens:
        start, end = self.ends[index : index + 2]
        return Tokens(list(self.input_ids[start:end]), list(self.labels[start:end]), [])

    def table(self) -> pa.Table:
        """Columns input_ids and labels: lists of int32."""
        columns = {"input_ids": self.input_ids, "labels": self.labels}
        ends = np.frombuffer(self.ends, dtype=np.int32)
        return pa.table(
            {name: pa.ListArray.from_arrays(ends, np.frombuffer(v, dtype=np.int32)) for name, v in columns.items()}
        )


def pack(examples: pa.Table | Sequence[Tokens], seq_len: int) -> Dataset:
    """Examples laid into rows of at most seq_len tokens, best fit first (TRL's "bfd"); none is cut."""
    table = examples if isinstance(examples, pa.Table) else Examples(examples).table()
    return pack_dataset(Dataset(table), seq_len, strategy="bfd")


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int, *, padding_free: bool = False) -> dict[str, Any]:
    """A micro-batch: input_ids, labels and position_ids, int64, and trained_positions as common.model.loss gives them.

    Positions restart at 0 with each example. As a rectangle (rows, longest row), transformers builds the
    block-diagonal attention mask from them, and a padding token is an example of its own. `padding_free` lays
    the rows behind one another, (1, tokens), and says in cu_seq_lens_q, int32 (examples + 1,), where each example
    begins, and in max_length_q how long the longest is: common.model.attention.
    """
    lengths = [n for row in rows for n in row["seq_lengths"]]
    if padding_free:
        longest, shape = sum(lengths), (1, sum(lengths))
        rows = [{name: [value for row in rows for value in row[name]] for name in rows[0]}]
    else:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
        position_ids[i, :length] = torch.cat([torch.arange(n) for n in row["seq_lengths"]])
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    batch["trained_positions"] = trained_positions(labels)
    if not padding_free:
        return batch
    ends = torch.tensor(lengths).cumsum(0)
    return batch | {"cu_seq_lens_q": pad(ends, (1, 0)).to(torch.int32), "max_length_q": max(lengths)}


def split_into_examples(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The micro-batch as one for each of its examples, without padding."""
    parts = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            if end - start < 2:  # padding; and nothing of a single token is trained
                continue
            part = {name: batch[name][row : row + 1, start:end] for name in ("input_ids", "labels", "position_ids")}
            part["trained_positions"] = trained_positions(part["labels"])
            if "cu_seq_lens_q" in batch:
                part["cu_seq_lens_q"] = batch["cu_seq_lens_q"].new_tensor([0, end - start])
                part["max_length_q"] = end - start
            parts.append(part)
    return parts


def halve(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The micro-batch as two, with the same examples whole; as it is where it holds a single row or example.

    A rectangle is cut between rows, a padding-free one at the end of the example that is nearest to its middle.
    """
    columns = ("input_ids", "labels", "position_ids")
    rows, tokens = batch["input_ids"].shape
    if "cu_seq_lens_q" not in batch:
        if rows == 1:
            return [batch]
        halves = [{name: batch[name][part] for name in columns} for part in (slice(rows // 2), slice(rows // 2, None))]
        return [half | {"trained_positions": trained_positions(half["labels"])} for half in halves]
    ends = batch["cu_seq_lens_q"].tolist()
    if len(ends) == 2:
        return [batch]
    middle = min(range(1, len(ends) - 1), key=lambda i: abs(ends[i] - tokens / 2))
    halves = []
    for part in (ends[: middle + 1], ends[middle:]):
        half = {name: batch[name][:, part[0] : part[-1]] for name in columns}
        half["trained_positions"] = trained_positions(half["labels"])
        half["cu_seq_lens_q"] = batch["cu_seq_lens_q"].new_tensor([end - part[0] for end in part])
        half["max_length_q"] = max(end - start for start, end in zip(part, part[1:], strict=False))
        halves.append(half)
    return halves
