"""Drift: how far a run has moved the model off its task, measured on general texts that it was not trained on.

Base and adapter read the same texts; the base is the model with its adapter switched off. Compared are the whole
distributions of the next token at each scored position, KL(base || adapter), and the loss of both. Scored are the
assistant's tokens of a conversation, and all of a plain text.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.batches import Batch, collate
from common.machine.collectives import all_reduce_sum
from common.machine.device import this_machine
from common.machine.out_of_memory import out_of_memory
from common.machine.slow_work import report_slow_work
from common.model.attention import uses_packed_attention
from common.model.divergence import head_divergence
from common.model.sharding import is_sharded
from common.run.general_texts import GeneralTexts
from common.run.held_out_loss import fill_up, own_batches

# Nats a token. PEFT's comparison of methods measures the same rise, on texts of Wikipedia (huggingface/peft, pull
# request 2925): Llama 3.2 3B on MetaMath has 0.059 with the usual scale of the adapter, and 0.111 with a fourfold one.
# 0.1 is also a tenth more perplexity.
LARGE_RISE = 0.1
DRIFT_ADVICE = (
    "half of TrainSpec.learning_rate, fewer epochs, or general rows mixed in (DataSpec.sources) keep more of the base"
)


@dataclass(frozen=True)
class Drift:
    """Base and adapter on general texts: means over the scored tokens, in nats a token."""

    source: str
    texts: int
    left_out: int  # rows of the source that the model's template refuses
    tokens: int  # scored
    base_loss: float
    loss: float
    kl: float  # KL(base || adapter)

    def lines(self) -> list[str]:
        """What a run prints of it, with advice where it is large."""
        found = (
            f"off the task: {self.texts:,} texts of {self.source}, loss {self.base_loss:.2f} before and "
            f"{self.loss:.2f} after, KL {self.kl:.2g} nats a token"
        )
        return [found, *([f"  {line}"] if (line := self.advice()) else [])]

    def advice(self) -> str | None:
        """What to do about a loss that has risen by more than LARGE_RISE; None where it has not."""
        rise = self.loss - self.base_loss
        return f"that is much ({rise:+.2f}): {DRIFT_ADVICE}" if rise > LARGE_RISE else None


def measure_drift(
    model: PeftModel, texts: GeneralTexts, tokenizer: PreTrainedTokenizerFast, micro_batch_rows: int = 1
) -> Drift | None:
    """Base and adapter on the texts; the model stays as it was. Each process computes a share, and all get the result.

    None, with a line that says why, where the memory does not suffice or the numbers are not finite: that ends no run.
    With sharded layers out of memory is raised, because the other processes would wait for this one; their
    micro-batches are no larger here than in training, and the tiles smaller.
    """
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id, padding_free=uses_packed_attention(model))
    own = list(own_batches(texts.rows, collate_rows, micro_batch_rows))
    filler = collate_rows(texts.rows[:1]) if is_sharded(model) else None
    totals, was_training = [0.0] * 5, model.training
    model.eval()
    try:
        with report_slow_work("base and adapter off the task", len(own), "micro-batches") as work:
            for number, batch in enumerate(fill_up(own, filler)):
                sums = compare_on_batch(model, batch).tolist()
                if number < len(own):
                    scored = [*sums, len(batch["trained_positions"]), 0.0]
                    totals = [total + value for total, value in zip(totals, scored, strict=True)]
                    work.done += 1
    except Exception as error:
        if out_of_memory(error) is None or filler is not None:
            raise
        totals[-1] = 1.0
    finally:
        model.train(was_training)
    kl, base_nll, nll, tokens, did_not_fit = all_reduce_sum(totals)
    if did_not_fit:
        print("off the task: not measured, it did not fit the card beside the optimizer; make eval measures it")
        return None
    if not math.isfinite(kl + base_nll + nll):
        print("off the task: not measured, the model gives no finite numbers on these texts")
        return None
    count = max(tokens, 1)
    return Drift(
        texts.source, texts.texts, texts.left_out, int(tokens), base_nll / count, nll / count, max(0.0, kl) / count
    )


@torch.no_grad()
def compare_on_batch(model: PeftModel, batch: Batch) -> Tensor:
    """KL(base || adapter), NLL of the base and with the adapter, summed over a micro-batch: as head_divergence."""
    device, head = this_machine().device, model.get_base_model().get_output_embeddings().weight
    labels, positions = batch["labels"].to(device), batch["trained_positions"].to(device)
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", "trained_positions")
    }
    with model.disable_adapter():
        base_hidden = last_hidden_states(model, inputs)[positions]
    hidden = last_hidden_states(model, inputs)[positions]
    return head_divergence(base_hidden, hidden, head, labels.flatten()[positions + 1])


def last_hidden_states(model: PeftModel, inputs: dict[str, Any]) -> Tensor:
    """What the head reads, (tokens of all rows, hidden size): the model's own forward, which computes one logit row.

    Its own, because that is where FSDP2 gathers sharded layers.
    """
    machine, found = this_machine(), list[Tensor]()
    decoder = model.get_base_model().base_model
    hook = decoder.register_forward_hook(lambda module, given, output: found.append(output.last_hidden_state))
    try:
        with torch.autocast(machine.device.type, machine.dtype, enabled=machine.is_gpu):
            model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return found[0].flatten(0, 1)
