"""Makes micro-batches from packed rows, and splits a micro-batch into smaller ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from common.tokens.labels import IGNORED, trained_positions

Batch = dict[str, Any]  # a micro-batch, as collate makes it
# The entries of collate_counted. HOST_IDS, an array: input_ids on the host, whatever device the tensors move to. Parts
# of a micro-batch have none: who needs the ids there asks the device.
TOKENS, HOST_IDS = "tokens", "host_ids"
# Entries of a micro-batch of better and worse answers. example_ids: int64, of labels' shape, the number of the
# conversation that a token belongs to, from 0 on; 0 where it is padding. signs: float32 (conversations,), 1 for a
# chosen or good answer and -1 for a rejected or bad one; of pairs the two answers follow each other, the chosen one
# first. reference: float64 (conversations,), log-likelihoods under the reference, once they are known. kl: float64 (),
# what KTO compares with, of the whole optimizer step; who knows it puts it in.
EXAMPLE_IDS, SIGNS, REFERENCE, KL = PREFERENCE_ENTRIES = ("example_ids", "signs", "reference", "kl")
_PER_CONVERSATION = {SIGNS: torch.float32, REFERENCE: torch.float64}
_TOKEN_COLUMNS = ("input_ids", "labels", "position_ids")


def collate(rows: Sequence[dict[str, list[Any]]], pad_token_id: int, *, padding_free: bool = False) -> Batch:
    """Makes a micro-batch: input_ids, labels and position_ids, int64, and trained_positions (common.tokens.labels).

    Rows of better and worse answers, which have signs, add PREFERENCE_ENTRIES but kl; reference where they have it.

    Positions restart at 0 with each example. Without `padding_free` the shape is (rows, longest row): transformers
    derives the block-diagonal attention mask from the positions, and each padding token is an example of its own.
    With `padding_free` the rows are concatenated, (1, tokens), and two entries serve common.model.attention:
    cu_seq_lens_q, int32 (examples + 1,), where each example begins and the last one ends; max_length_q, the length of
    the longest example.
    """
    lengths = [length for row in rows for length in row["seq_lengths"]]
    if padding_free:
        shape = (1, sum(lengths))
        rows = [{name: [value for row in rows for value in row[name]] for name in rows[0]}]
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
    if SIGNS in rows[0]:
        batch |= _preference_entries(rows, position_ids.shape)
    if not padding_free:
        return batch
    ends = torch.tensor(lengths).cumsum(0)
    return batch | {"cu_seq_lens_q": pad(ends, (1, 0)).to(torch.int32), "max_length_q": max(lengths)}


def _preference_entries(rows: Sequence[dict[str, list[Any]]], shape: Sequence[int]) -> Batch:
    example_ids, first = torch.zeros(tuple(shape), dtype=torch.long), 0
    for i, row in enumerate(rows):
        numbers = torch.arange(first, first := first + len(row["seq_lengths"]))
        ids = numbers.repeat_interleave(torch.tensor(row["seq_lengths"]))
        example_ids[i, : len(ids)] = ids
    values = {
        name: torch.tensor([value for row in rows for value in row[name]], dtype=dtype)
        for name, dtype in _PER_CONVERSATION.items()
        if name in rows[0]
    }
    return {EXAMPLE_IDS: example_ids, **values}


def collate_counted(rows: Sequence[dict[str, list[int]]], collate_rows: Callable[..., Batch]) -> Batch:
    """What collate_rows makes of the rows, with the number of their tokens under TOKENS, and HOST_IDS for the model.

    Known here, no GPU is waited for. Who takes the batch takes the number out before the model sees it.
    """
    batch = collate_rows(rows)
    return batch | {TOKENS: sum(len(row["input_ids"]) for row in rows), HOST_IDS: batch["input_ids"].numpy()}


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

    A chosen answer and the rejected one behind it stay together. Returns the micro-batch alone when it holds a single
    row, a single example or a single pair.
    """
    return _halve_padding_free(batch) if "cu_seq_lens_q" in batch else _halve_rows(batch)


def _halve_rows(batch: Batch) -> list[Batch]:
    rows = len(batch["input_ids"])
    if rows == 1:
        return [batch]
    halves = []
    for part in (slice(rows // 2), slice(rows // 2, None)):
        half = {name: batch[name][part] for name in _TOKEN_COLUMNS}
        half["trained_positions"] = trained_positions(half["labels"])
        halves.append(half)
    return _halve_preferences(batch, halves, (slice(rows // 2), slice(rows // 2, None)))


def _halve_padding_free(batch: Batch) -> list[Batch]:
    bounds = batch["cu_seq_lens_q"].tolist()
    between = [i for i in range(1, len(bounds) - 1) if not _is_within_pair(batch, bounds, i)]
    if not between:
        return [batch]
    middle = min(between, key=lambda i: abs(bounds[i] - bounds[-1] / 2))
    halves, parts = [], []
    for part in (bounds[: middle + 1], bounds[middle:]):
        parts.append((slice(None), slice(part[0], part[-1])))
        half = {name: batch[name][parts[-1]] for name in _TOKEN_COLUMNS}
        half["trained_positions"] = trained_positions(half["labels"])
        half["cu_seq_lens_q"] = batch["cu_seq_lens_q"].new_tensor([bound - part[0] for bound in part])
        half["max_length_q"] = max(end - start for start, end in zip(part, part[1:], strict=False))
        halves.append(half)
    return _halve_preferences(batch, halves, parts)


def _is_within_pair(batch: Batch, bounds: list[int], place: int) -> bool:
    """Whether a chosen answer ends at this place among the bounds, and its rejected one begins: to the same prompt."""
    if SIGNS not in batch or not batch[SIGNS][place - 1] > 0 > batch[SIGNS][place]:
        return False
    prompts = []
    for start, end in (bounds[place - 1 : place + 1], bounds[place : place + 2]):
        trained = (batch["labels"][0, start:end] != IGNORED).nonzero()
        prompts.append(batch["input_ids"][0, start : start + int(trained[0]) if len(trained) else end])
    return torch.equal(*prompts)


def _halve_preferences(batch: Batch, halves: list[Batch], parts: Sequence[Any]) -> list[Batch]:
    """Adds to each half its preference entries. parts: the indices of the halves' tokens."""
    if SIGNS not in batch:
        return halves
    first = 0
    for half, part in zip(halves, parts, strict=True):
        ids = batch[EXAMPLE_IDS][part]
        last = int(ids.max()) + 1
        half[EXAMPLE_IDS] = (ids - first).clamp(min=0)  # of padding, which is 0
        half |= {name: batch[name][first:last] for name in _PER_CONVERSATION if name in batch}
        half |= {KL: batch[KL]} if KL in batch else {}
        first = last
    return halves
