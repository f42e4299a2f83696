"""Head and loss fused: cross-entropy over the vocabulary, computed in tiles, without the logits of all tokens.

The head is frozen, so training needs the gradient of the hidden states alone, and the forward pass can compute it: a
tile of logits is overwritten with its gradient (common.kernels.cross_entropy). That takes two matmuls with the head
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

from common.kernels.cross_entropy import cross_entropy_
from common.process_state import full_precision_sums
from common.tokens.labels import trained_positions as find_trained_positions

# Of a tile of logits: 128 MiB in 16 bits. With it the loss is not the peak of a step of 2,048 tokens any more, so a
# smaller one saves nothing there; and it is the 512 rows of Llama 3's vocabulary that a matmul needs to be bound by its
# FLOP: a tile reads the head twice, and an H100 does 240 of a row's multiplications while it reads a weight.
TILE_ENTRIES = 1 << 26
ROWS_OF_A_BLOCK = 128  # that a program of a matmul computes: with 10 rows more than a multiple it works for 128
# Times this, the gradient of fp16 logits is in [-1024, 1024]. Without it an entry below 2^-25 is lost: of a token of
# probability 0.999 a third of all the others, and its gradient is off by a seventh. A head's output is at most
# 2 * 1024 * its largest weight, within fp16 up to weights of 32.
FP16_SCALE = 1024.0


def _rows_of_a_tile(vocabulary: int) -> int:
    rows = max(1, TILE_ENTRIES // vocabulary)
    return rows if rows < ROWS_OF_A_BLOCK else rows - rows % ROWS_OF_A_BLOCK


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if wants_gradient else None
        ctx.scale = FP16_SCALE if weight.dtype == torch.float16 else 1.0
        nll = torch.empty_like(targets, dtype=torch.float32)
        tokens, rows = len(positions), _rows_of_a_tile(len(weight))
        with full_precision_sums():
            for start in range(0, tokens, rows):
                tile = slice(start, start + rows)
                here = positions[tile]
                logits = torch.mm(hidden[here].to(weight.dtype), weight.t())
                nll[tile] = cross_entropy_(logits, targets[tile], ctx.scale if wants_gradient else 0.0)
                if gradient is not None:
                    gradient[here] = torch.mm(logits, weight).to(gradient.dtype)
                del logits  # before those of the next tile are there
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # A vector of one number in fp32: it is not rounded to the gradient's dtype before the product.
        factor = (grad / ctx.scale).reshape(1)
        return torch.mul(gradient, factor, out=torch.empty_like(gradient)), None, None, None


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
