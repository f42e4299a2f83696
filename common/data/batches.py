"""Makes micro-batches from packed rows, and splits a micro-batch into smaller ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from common.tokens.labels import IGNORED, trained_positions

Batch = dict[str, Any]  # a micro-batch, as collate makes it
TOKENS = "tokens"  # the entry of collate_counted
_TOKEN_COLUMNS = ("input_ids", "labels", "position_ids")


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int, *, padding_free: bool = False) -> Batch:
    """Makes a micro-batch: input_ids, labels and position_ids, int64, and trained_positions (common.tokens.labels).

    Positions restart at 0 with each example. Without `padding_free` the shape is (rows, longest row): transformers
    derives the block-diagonal attention mask from the positions, and each padding token is an example of its own.
    With `padding_free` the rows are concatenated, (1, tokens), and two entries serve common.model.attention:
    cu_seq_lens_q, int32 (examples + 1,), where each example begins and the last one ends; max_length_q, the length of
    the longest example.
    """
    lengths = [length for row in rows for length in row["seq_lengths"]]
    given, first = rows, rows[0]
    if padding_free:
        shape = (1, sum(lengths))
        rows = [{name: [value for row in rows for value in row[name]] for name in (*_TOKEN_COLUMNS[:2], "seq_lengths")}]
    else:
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
        position_ids[i, :length] = torch.cat([torch.arange(n) for n in row["seq_lengths"]])
    batch: Batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    batch["trained_positions"] = trained_positions(labels)
    if "signs" in first:
        batch |= _of_examples(given, shape)
    if not padding_free:
        return batch
    ends = torch.tensor(lengths).cumsum(0)
    return batch | {"cu_seq_lens_q": pad(ends, (1, 0)).to(torch.int32), "max_length_q": max(lengths)}


def _of_examples(rows: Sequence[dict[str, list[int]]], shape: tuple[int, int]) -> Batch:
    """example_ids, signs and, where the rows have it, reference of a micro-batch."""
    numbers, count = [], 0
    for row in rows:
        lengths = row["seq_lengths"]
        numbers.append(torch.arange(count, count + len(lengths)).repeat_interleave(torch.tensor(lengths)))
        count += len(lengths)
    if shape[0] == 1:
        numbers = [torch.cat(numbers)]
    ids = torch.zeros(shape, dtype=torch.long)
    for line, own in zip(ids, numbers, strict=True):
        line[: len(own)] = own
    found: Batch = {"example_ids": ids}
    for name, dtype in (("signs", torch.float32), ("reference", torch.float64)):
        if name in rows[0]:
            found[name] = torch.tensor([value for row in rows for value in row[name]], dtype=dtype)
    return found


def _cut_examples(batch: Batch, ids: torch.Tensor) -> Batch:
    """Those entries of a part of the micro-batch, whose example_ids are `ids`."""
    first = int(ids.flatten()[0])
    count = int(ids.max()) + 1 - first
    cut = {name: batch[name][first : first + count] for name in ("signs", "reference") if name in batch}
    return {"example_ids": (ids - first).clamp(min=0), **cut}


def collate_counted(rows: Sequence[dict[str, list[int]]], collate_rows: Callable[..., Batch]) -> Batch:
    """What collate_rows makes of the rows, with the number of their tokens under TOKENS.

    Counted here, no GPU is waited for. Who takes the batch takes the number out before the model sees it.
    """
    return collate_rows(rows) | {TOKENS: sum(len(row["input_ids"]) for row in rows)}


def split_into_examples(batch: Batch) -> list[Batch]:
    """Returns one micro-batch for each example of this one, without padding."""
    parts = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            if end - start < 2:  # a padding token, or an example of one token, of which nothing is trained
                continue
            part = {name: batch[name][row : row + 1, start:end] for name in _TOKEN_COLUMNS}
            part["trained_positions"] = trained_positions(part["labels"])
            if "cu_seq_lens_q" in batch:
                part["cu_seq_lens_q"] = batch["cu_seq_lens_q"].new_tensor([0, end - start])
                part["max_length_q"] = end - start
            parts.append(part)
    return parts


def halve(batch: Batch) -> list[Batch]:
    """Splits the micro-batch in two, between rows, or if it is padding-free between the examples nearest its middle.

    Returns it alone when it holds a single row, or a single example.
    """
    return _halve_padding_free(batch) if "cu_seq_lens_q" in batch else _halve_rows(batch)


def _halve_rows(batch: Batch) -> list[Batch]:
    rows = len(batch["input_ids"])
    if rows == 1:
        return [batch]
    halves = []
    for part in (slice(rows // 2), slice(rows // 2, None)):
        half = {name: batch[name][part] for name in _TOKEN_COLUMNS}
        if "signs" in batch:
            half |= _cut_examples(batch, batch["example_ids"][part])
        halves.append(half | {"trained_positions": trained_positions(half["labels"])})
    return halves


def _halve_padding_free(batch: Batch) -> list[Batch]:
    bounds = batch["cu_seq_lens_q"].tolist()
    signs = batch["signs"].tolist() if "signs" in batch else [1.0] * (len(bounds) - 1)
    between = [i for i in range(1, len(bounds) - 1) if not signs[i - 1] > 0 > signs[i]]
    if not between:
        return [batch]
    middle = min(between, key=lambda i: abs(bounds[i] - bounds[-1] / 2))
    halves = []
    for part in (bounds[: middle + 1], bounds[middle:]):
        half = {name: batch[name][:, part[0] : part[-1]] for name in _TOKEN_COLUMNS}
        half["trained_positions"] = trained_positions(half["labels"])
        half["cu_seq_lens_q"] = batch["cu_seq_lens_q"].new_tensor([bound - part[0] for bound in part])
        half["max_length_q"] = max(end - start for start, end in zip(part, part[1:], strict=False))
        if "signs" in batch:
            half |= _cut_examples(batch, batch["example_ids"][:, part[0] : part[-1]])
        halves.append(half)
    return halves
