"""Head and loss fused: cross-entropy over the vocabulary, computed in tiles, without the logits of all tokens.

The head is frozen, so training needs the gradient of the hidden states alone, and the forward pass can compute it: a
tile of logits is overwritten with its gradient (common.kernels.cross_entropy). That takes two matmuls with the head
instead of three (TRL 1.16 computes each tile again in backward), and saves only a gradient of the hidden states' size.
The same code runs on a GPU, on a CPU, and on the fake tensors of a plan.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from common.kernels.cross_entropy import cross_entropy_
from common.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from common.model.host_embedding import give_host_ids
from common.process_state import full_precision_sums
from common.tokens.labels import trained_positions as find_trained_positions

# Of a tile of logits, 128 MiB in 16 bits. By the plan the loss then adds nothing to the peak of a step of 2,048 tokens,
# so a smaller tile saves nothing there. It is 512 rows of Llama 3's vocabulary. Each tile reads the head twice, and
# meanwhile an H100 computes 240 rows, an RTX 4090 160 (common/plan/speed.py): with fewer rows a step takes longer.
TILE_ENTRIES = 1 << 26
# A program of a matmul computes 128 rows or 64: a tile of 523 takes as long as one of 640.
ROWS_OF_A_PROGRAM = 128
# The gradient of fp16 logits is kept so many times as large as it is. An entry below 2^-25 would be lost: beside a
# token of probability 0.999 a third of what the others have if they are spread as words are, all of it if evenly. The
# trainer's GradScaler comes too late for that. The sums over the vocabulary stay within 2 * 1024 times the head's
# largest weight, so within fp16 for weights up to 32.
FP16_SCALE = 1024.0


def _rows_of_a_tile(vocabulary: int) -> int:
    rows = max(1, TILE_ENTRIES // vocabulary)
    return rows if rows < ROWS_OF_A_PROGRAM else rows - rows % ROWS_OF_A_PROGRAM


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor, norm: tuple[Tensor, float] | None
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient = None
        if wants_gradient:
            gradient = torch.zeros_like(hidden) if norm is None else hidden.detach()
        ctx.in_place = norm is not None
        ctx.scale = FP16_SCALE if weight.dtype == torch.float16 else 1.0
        nll = torch.empty_like(targets, dtype=torch.float32)
        tokens, rows = len(positions), _rows_of_a_tile(len(weight))
        with full_precision_sums():
            for start in range(0, tokens, rows):
                tile = slice(start, start + rows)
                here = positions[tile]
                states = hidden[here]
                if norm is not None:
                    inner, states = states, rms_norm_forward(states, *norm)
                logits = torch.mm(states.to(weight.dtype), weight.t())
                del states
                nll[tile] = cross_entropy_(logits, targets[tile], ctx.scale if wants_gradient else 0.0)
                if gradient is not None:
                    of_states = torch.mm(logits, weight).to(gradient.dtype)
                    gradient[here] = of_states if norm is None else rms_norm_backward(of_states, inner, *norm)
                    del of_states
                del logits  # before those of the next tile are there
        if gradient is not None:
            if norm is not None:  # nothing else has written over the others' hidden states
                untrained = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device).index_fill_(0, positions, 0)
                gradient.masked_fill_(untrained[:, None], 0)
            ctx.save_for_backward(gradient, positions)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient, positions = ctx.saved_tensors
        # A number a token, in fp32: it is not rounded to the gradient's dtype before the product.
        factors = torch.zeros(len(gradient), 1, dtype=torch.float32, device=gradient.device)
        factors[positions, 0] = grad / ctx.scale
        out = gradient if ctx.in_place else torch.empty_like(gradient)
        return torch.mul(gradient, factors, out=out), None, None, None, None


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    positions: Tensor,
    targets: Tensor,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Negative log-likelihood of each trained position in nats: fp32 (trained,).

    hidden: (tokens, hidden size), any float dtype. weight: the frozen head, (vocabulary, hidden size); logits are
    computed in its dtype, their softmax in fp32. positions: int64 (trained,), rows of `hidden` whose next token is
    trained, each at most once. targets: int64 (trained,), those next tokens. Differentiable in `hidden` alone, once.

    norm: the weight and eps of an RMS norm that `hidden` goes through first. Then the gradient is written over `hidden`
    while the loss is computed: nobody else may need it any more.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLoss.apply(hidden, weight, positions, targets, norm)


def fuse_head_and_loss(model: PreTrainedModel) -> None:
    """Replaces the model's forward: with labels it returns the loss without logits, else it is the stock forward.

    labels: int64 (rows, tokens), not shifted, IGNORED where nothing is trained. trained_positions: optional, from
    common.tokens.labels.trained_positions; None searches the labels, and then the host waits for the GPU.
    num_items_in_batch: what the summed loss is divided by; None divides by the trained tokens of this batch.
    per_token: instead of one number the loss is the NLL of each trained token, fp32 (trained,), in their order.
    host_ids: optional, as common.model.host_embedding.give_host_ids.
    """
    stock = model.forward

    @wraps(type(model).forward)  # `generate` and the trainer read the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        trained_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        per_token: bool = False,
        host_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        give_host_ids(self, host_ids)
        if labels is None:
            return stock(*args, **kwargs)
        positions = find_trained_positions(labels) if trained_positions is None else trained_positions
        with _without_last_norm(self) as norm:
            hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        targets = labels.flatten()[positions + 1]
        nll = head_loss(hidden.flatten(0, 1), self.get_output_embeddings().weight, positions, targets, norm)
        if per_token:
            return CausalLMOutput(loss=nll)
        count = max(1, len(positions)) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=nll.sum() / count)

    model.forward = MethodType(forward, model)
    model.norm_in_loss = False


@contextmanager
def _without_last_norm(model: PreTrainedModel) -> Iterator[tuple[Tensor, float] | None]:
    """Leaves out the norm before the head where the model says norm_in_loss; yields the norm's weight and eps then."""
    if not model.norm_in_loss:
        yield None
        return
    norm = model.base_model.norm
    model.base_model.norm = nn.Identity()
    try:
        yield norm.weight, norm.variance_epsilon
    finally:
        model.base_model.norm = norm
