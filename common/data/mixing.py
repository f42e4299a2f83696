"""Mixes sources by their weights: which rows of each are taken."""

from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def mix(rows: Sequence[int], weights: Sequence[float], seed: int) -> list[Mask]:
    """Returns for each source which of its rows are in the mixture, drawn by the seed.

    rows: how many each source has. A weight is a share of the mixture's rows, relative to the other weights. No row is
    taken twice: the mixture is as large as the source allows that has the fewest rows for its weight, of which all are
    in it, and of the others as many as their weights say, at least one.
    """
    size = min(count / weight for count, weight in zip(rows, weights, strict=True))
    dice, masks = Random(seed), []
    for count, weight in zip(rows, weights, strict=True):
        taken = min(count, max(1, round(weight * size)))
        mask = np.zeros(count, dtype=bool)
        mask[dice.sample(range(count), taken)] = True
        masks.append(mask)
    return masks
