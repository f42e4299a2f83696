"""Draws the examples that are held out to measure the loss: none of them is trained on in any form.

The pieces of one row, and rows with an exact copy of one, are held out together or not at all.
"""

from random import Random

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int32]


def draw_held_out(
    documents: Integers, hashes: npt.NDArray[np.uint64], sources: Integers, count: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Returns which examples are held out: at most `count`, of each source in proportion to its examples.

    For each example: documents, a number of the row that it comes from; hashes, equal for exact copies; sources, the
    number of its source.
    """
    units = _join_copies(documents, hashes)
    unit_sizes = np.bincount(units)
    unit_sources = np.zeros(len(unit_sizes), dtype=int)
    unit_sources[units[::-1]] = sources[::-1]  # of the unit's first example
    left = _shares(np.bincount(unit_sources, weights=unit_sizes), count)
    drawn = np.zeros(len(unit_sizes), dtype=bool)
    for unit in Random(seed).sample(range(len(unit_sizes)), len(unit_sizes)):
        if not left.any():
            break
        if 0 < unit_sizes[unit] <= left[unit_sources[unit]]:
            drawn[unit] = True
            left[unit_sources[unit]] -= unit_sizes[unit]
    return drawn[units]


def _join_copies(documents: Integers, hashes: npt.NDArray[np.uint64]) -> Integers:
    """Returns for each example the number of its unit: the least document that it hangs together with by copies."""
    first = list(range(documents.max(initial=-1) + 1))

    def find(document: int) -> int:
        while first[document] != document:
            first[document] = first[first[document]]
            document = first[document]
        return document

    order = np.argsort(hashes, kind="stable")
    is_copy = hashes[order][1:] == hashes[order][:-1]
    in_order = documents[order]
    for one, other in zip(in_order[:-1][is_copy].tolist(), in_order[1:][is_copy].tolist(), strict=True):
        low, high = sorted((find(one), find(other)))
        first[high] = low
    return np.array([find(document) for document in range(len(first))], dtype=np.int32)[documents]


def _shares(sizes: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Divides count in proportion to the sizes, to whole numbers that add up to it."""
    exact = count * sizes / max(1, sizes.sum())
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    return shares
