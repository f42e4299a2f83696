"""Held-out loss: negative log-likelihood per trained token, over all of them alike."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from common.data.batches import Batch
from common.machine.collectives import all_reduce_max, all_reduce_sum
from common.machine.device import this_machine
from common.machine.processes import rank, world_size
from common.machine.slow_work import report_slow_work


@contextmanager
def forward_only(model: Any) -> Iterator[None]:
    """Without gradients and dropout; on a GPU under autocast, as in training."""
    machine, was_training = this_machine(), model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(machine.device.type, machine.dtype, enabled=machine.is_gpu):
            yield
    finally:
        model.train(was_training)


def on_device(batch: Batch) -> Batch:
    device = this_machine().device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def batch_nll(model: Any, batch: Batch) -> Tensor:
    """Negative log-likelihood of a micro-batch in nats, summed over its trained tokens: fp32 scalar."""
    with forward_only(model):
        loss: Tensor = model(**on_device(batch), num_items_in_batch=1).loss
    return loss


def mean_nll(
    rows: Dataset,
    nll: Callable[[Batch], float],
    collate_rows: Callable[[list[dict[str, list[int]]]], Batch],
    micro_batch_rows: int = 1,
    filler: Batch | None = None,
) -> tuple[float, int]:
    """Mean NLL per trained token of packed rows, in nats, and the number of trained tokens.

    Each process computes a share of the rows. nll: of a micro-batch, summed over its trained tokens. filler: for
    sharded layers, see fill_up.
    """
    total, tokens = 0.0, 0
    own = own_batches(rows, collate_rows, micro_batch_rows)
    with report_slow_work("held-out loss", len(rows), "rows") as work:
        for number, batch in enumerate(fill_up(own, filler)):
            loss = nll(batch)
            if number < len(own):
                total += loss
                tokens += len(batch["trained_positions"])
                work.done = min(len(rows), (number + 1) * micro_batch_rows * world_size())
    total, all_tokens = all_reduce_sum([total, tokens])
    return total / max(all_tokens, 1), int(all_tokens)


def own_batches(
    rows: Dataset | Sequence[dict[str, list[int]]],
    collate_rows: Callable[[list[dict[str, list[int]]]], Batch],
    micro_batch_rows: int,
) -> Sequence[Batch]:
    """This process's share of packed rows. Each is in one share: a distributed loader would repeat some to fill up.

    Each micro-batch is made when it is asked for: 200 rows of a million tokens would take gigabytes of host memory.
    """
    own = range(rank(), len(rows), world_size())
    starts = range(0, len(own), micro_batch_rows)
    return _LazyBatches(lambda n: collate_rows([rows[row] for row in own[starts[n] :][:micro_batch_rows]]), len(starts))


class _LazyBatches(Sequence[Batch]):
    def __init__(self, make: Callable[[int], Batch], length: int) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.make(index)


def fill_up(batches: Sequence[Batch], filler: Batch | None) -> Iterator[Batch]:
    """The batches, then `filler` until every process has computed as many; without a filler the batches alone.

    Sharded layers need it: all processes take part in each all-gather.
    """
    fillers: list[Batch] = []
    if filler is not None:  # before the first batch: no process may wait here while another one gathers a layer
        fillers = [filler] * (all_reduce_max(len(batches)) - len(batches))
    yield from batches
    yield from fillers


def perplexity(loss: float) -> float:
    """loss: nats per token, taken as 700 at most: beyond it a float overflows."""
    return math.exp(min(loss, 700.0))


def lowest_held_out_loss(entries: list[dict[str, Any]], kept_step: int | None = None) -> str | None:
    """A line that says so when the held-out loss was clearly lower before the step that is kept; None when it was not.

    entries: of metrics.jsonl. kept_step: None keeps the last. Clearly: by a hundredth of it.
    """
    measured = [(entry["eval_loss"], entry["step"]) for entry in entries if "eval_loss" in entry]
    kept = [(loss, step) for loss, step in measured if step == kept_step] or measured[-1:]
    if not measured or kept[-1][0] < 1.01 * min(measured)[0]:
        return None
    lowest, step = min(measured)
    found = f"held-out loss was lowest at step {step} ({lowest:.4f}); it is {kept[-1][0]:.4f} now"
    if step == 0:
        return f"{found}: training made it worse. Try a lower learning rate, and look at the data"
    return f'{found}: fewer epochs would do, or TrainSpec(keep="best")'
