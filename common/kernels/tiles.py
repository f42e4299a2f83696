"""The tokens of a long row in tiles: what grows with a row's length is then computed for one tile at a time."""

from collections.abc import Iterator


def split(tokens: int, size: int) -> Iterator[slice]:
    """Slices of `size` tokens each, in order; the last one may be shorter. size: 1 or more.

    Call it as `tiles.split`. A plan puts its own in this place, which computes a few tiles and counts them as all.
    """
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))
