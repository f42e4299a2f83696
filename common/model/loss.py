"""Head and loss fused: cross-entropy over the vocabulary, computed in tiles, without the logits of all tokens.

The head is frozen, so training needs the gradient of the hidden states alone, and the forward pass can compute it: a
tile of logits becomes probabilities, and those become its gradient, in place. That takes two matmuls with the head
instead of three (TRL 1.16 computes each tile again in backward), and saves only a gradient of the hidden states' size.
The same code runs on a GPU, on a CPU, and on the fake tensors of a plan.
"""

from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from common.tokens.labels import trained_positions as find_trained_positions

# A tile of logits in fp32. 2^26 entries are 512 tokens of Llama 3's vocabulary: enough rows for a saturated matmul.
TILE_ENTRIES = 1 << 26


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        tokens, vocabulary = len(positions), len(weight)
        rows = max(1, min(tokens, TILE_ENTRIES // vocabulary))
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if wants_gradient else None
        tile = torch.empty((rows, vocabulary), dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, rows):
            here, target = positions[start : start + rows], targets[start : start + rows, None]
            probabilities = tile[: len(here)]
            logits = torch.mm(hidden[here].to(weight.dtype), weight.t())
            probabilities.copy_(logits)
            highest = probabilities.amax(-1, keepdim=True)
            target_logit = probabilities.gather(-1, target)
            partition = probabilities.sub_(highest).exp_().sum(-1, keepdim=True)
            total += (partition.log() + highest - target_logit).sum()
            if gradient is not None:
                # d loss / d logits = softmax - 1 at the target
                probabilities.div_(partition)
                probabilities[torch.arange(len(here), device=here.device), target[:, 0]] -= 1
                gradient[here] = torch.mm(logits.copy_(probabilities), weight).to(gradient.dtype)
            del logits
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def head_loss(hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over the trained positions; fp32 scalar.

    hidden: (tokens, hidden size), any float dtype. weight: the frozen head, (vocabulary, hidden size); logits are
    computed in its dtype, their softmax in fp32. positions: int64 (trained,), rows of `hidden` whose next token is
    trained, each at most once. targets: int64 (trained,), those next tokens. Differentiable in `hidden` alone, once.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLoss.apply(hidden, weight, positions, targets)


def fuse_head_and_loss(model: PreTrainedModel) -> None:
    """Replaces the model's forward: with labels it returns the loss without logits, else it is the stock forward.

    labels: int64 (rows, tokens), not shifted, IGNORED where nothing is trained. trained_positions: optional, from
    common.tokens.labels.trained_positions; None searches the labels, and then the host waits for the GPU.
    num_items_in_batch: what the summed loss is divided by; None divides by the trained tokens of this batch.
    """
    stock = model.forward

    @wraps(type(model).forward)  # `generate` and the trainer read the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        trained_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return stock(*args, **kwargs)
        positions = find_trained_positions(labels) if trained_positions is None else trained_positions
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        targets = labels.flatten()[positions + 1]
        total = head_loss(hidden.flatten(0, 1), self.get_output_embeddings().weight, positions, targets)
        count = max(1, len(positions)) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)

    model.forward = MethodType(forward, model)
