"""How many rows would fit whole, at the recipe's seq_len and at longer ones."""

from collections import Counter
from itertools import count

MAX_SHOWN = 5  # lengths in a line


def shortest_fit(tokens: int, seq_len: int) -> int:
    """The shortest of the lengths seq_len, 1.5, 2, 3, 4, 6, 8 … times as much that takes so many tokens."""
    doubled = next(seq_len << power for power in count() if seq_len << power >= tokens)
    between = doubled * 3 // 4  # 1.5 times the length before
    return between if doubled > 2 * seq_len - 1 and between >= tokens else doubled


def fit_line(rows: Counter[int], seq_len: int) -> str:
    """ "512: 976 of 999 rows; 768: 996; 1,024: all". Empty where all rows fit at seq_len.

    rows: how many there are for each result of shortest_fit.
    """
    total, fitting, parts = rows.total(), rows[seq_len], []
    if fitting == total:
        return ""
    for length in sorted(rows.keys() - {seq_len}):
        fitting += rows[length]
        parts.append(f"{length:,}: {f'{fitting:,}' if fitting < total else 'all'}")
    shown = parts if len(parts) < MAX_SHOWN else [*parts[: MAX_SHOWN - 2], parts[-1]]
    return "; ".join([f"{seq_len:,}: {rows[seq_len]:,} of {total:,} {'row' if total == 1 else 'rows'}", *shown])
