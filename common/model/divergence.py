"""How far the next-token distributions of two models with one head are apart, in tiles, without all logits at once."""

import torch
from torch import Tensor

# Entries of a tile in fp32, of which five are alive at once: 80 MiB, less than the tile of the loss, which a plan
# counts (common.model.loss). 2^22 entries are 32 tokens of Llama 3's vocabulary.
DIVERGENCE_TILE_ENTRIES = 1 << 22


def head_divergence(base_hidden: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """KL(base || model), NLL of the base and NLL of the model, in nats, each summed over the positions: float64 (3,).

    base_hidden and hidden: (positions, hidden size), any float dtype. weight: the head of both, (vocabulary, hidden
    size); logits are computed in its dtype, the rest in fp32. targets: int64 (positions,), the tokens that follow.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    rows = max(1, DIVERGENCE_TILE_ENTRIES // len(weight))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(targets), rows):
            here, target = slice(start, start + rows), targets[start : start + rows, None]
            base_log, log = (
                torch.mm(states[here].to(weight.dtype), weight.t()).float().log_softmax(-1)
                for states in (base_hidden, hidden)
            )
            sums[1] -= base_log.gather(-1, target).sum(dtype=torch.float64)
            sums[2] -= log.gather(-1, target).sum(dtype=torch.float64)
            # sum p (log p - log q) + q - p: q - p sums to 0, and takes away what rounding the two sums of exponentials
            # adds to the rest. What is left of rounding may be below 0, and no divergence is.
            base_probability = base_log.exp()
            kl = base_log.sub_(log).mul_(base_probability).sub_(base_probability)
            kl += log.exp_()
            sums[0] += kl.sum(-1).clamp_(min=0).sum(dtype=torch.float64)
    return sums
