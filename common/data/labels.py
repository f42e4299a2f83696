"""Labels: which tokens are trained."""

import torch
from torch import Tensor

IGNORED = -100  # a label that is not trained, as in torch.nn.functional.cross_entropy


def trained_positions(labels: Tensor) -> Tensor:
    """Where the next token of the same row is trained: int64 (trained,), into the flattened (rows, tokens)."""
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return (following.flatten() != IGNORED).nonzero().squeeze(-1)
