"""The rehearsal: the step that needs the most memory, computed once before the first optimizer step.

A run that does not fit on the card ends there, in its first seconds, or begins with as much less as it needs.
"""

import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.data.batches import Batch, collate
from common.data.rows import Rows
from common.machine.device import this_machine
from common.machine.slow_work import report_slow_work
from common.tokens.labels import IGNORED, trained_positions


def worst_batch(rows: Rows, micro_batch_rows: int, *, padding_free: bool) -> Batch:
    """A micro-batch of the longest rows, held out or not; every token but an example's first is trained.

    padding_free: they are cut into as many examples as the rows have that have the most, because attention takes memory
    for each. Pairs and rated answers stay whole.
    """
    packed = [part for part in (rows.train, rows.evaluation) if part is not None]
    lengths = ((sum(n), which, row) for which, part in enumerate(packed) for row, n in enumerate(part["seq_lengths"]))
    longest = [packed[which][row] for _, which, row in heapq.nlargest(micro_batch_rows, lengths)]
    if padding_free and rows.kind == "conversations":
        counts = (len(lengths) for part in packed for lengths in part["seq_lengths"])
        # The row that is the n-th in length has as many tokens as the n-th of these, or more.
        longest = [_cut(*pair) for pair in zip(longest, heapq.nlargest(micro_batch_rows, counts), strict=True)]
    batch = collate(longest, pad_token_id=0, padding_free=padding_free)
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORED)
    batch["trained_positions"] = trained_positions(batch["labels"])
    return batch


def _cut(row: dict[str, Any], examples: int) -> dict[str, Any]:
    """The row as so many examples, all about as long, where it has fewer."""
    if len(row["seq_lengths"]) >= examples:
        return row
    each, longer = divmod(len(row["input_ids"]), examples)
    return row | {"seq_lengths": [each + 1] * longer + [each] * (examples - longer)}


def rehearse(
    model: nn.Module,
    worst: Batch,
    train_micro_batch: Callable[[Batch, Tensor], Tensor],
    evaluate_micro_batch: Callable[[Batch], float],
    *,
    device: torch.device,
    accumulates: bool,
    missing_state_bytes: int,
) -> None:
    """Computes gradients, then the held-out loss, of the worst micro-batch, beside optimizer states of full size.

    train_micro_batch gets the batch and the number of its trained tokens. accumulates: whether an optimizer step has
    several micro-batches, which meet the gradients of those before. missing_state_bytes: of the optimizer states that
    the first step will allocate. Weights and random numbers stay what they were, and no gradients are left. The peak
    of a GPU's memory is counted anew from here: what a plan predicts is a step's, and loading may have taken more.
    """
    this_machine().reset_peak()
    trained = torch.tensor(len(worst["trained_positions"]), device=device)
    with (
        report_slow_work("rehearsal of the largest micro-batch"),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        states = torch.empty(missing_state_bytes, dtype=torch.uint8, device=device)
        for _ in range(2 if accumulates else 1):
            train_micro_batch(worst, trained)
        evaluate_micro_batch(worst)
        del states
    model.zero_grad()
