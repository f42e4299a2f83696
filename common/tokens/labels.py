"""Which tokens are trained: the labels of a row, and the positions that predict a trained token."""

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that is not trained; the default of torch.nn.functional.cross_entropy


def trained_positions(labels: Tensor) -> Tensor:
    """Returns the positions whose next token in the same row is trained: where the loss needs logits.

    labels: int64 (rows, tokens). Returns int64 (trained,), indices into the flattened (rows * tokens).
    """
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return (next_labels.flatten() != IGNORED).nonzero().squeeze(-1)
