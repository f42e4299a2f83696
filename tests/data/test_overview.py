"""Lengths and packing in words and numbers: each is what one counts by hand."""

from dataclasses import replace

import pytest

from common.data.overview import Lengths, Packing
from common.data.packing import pack
from common.data.rows import Rows
from common.recipe import TrainSpec
from common.tokens.chat_format import Tokens
from common.tokens.labels import IGNORED

TRAIN = TrainSpec(seq_len=64, rows_per_step=2, learning_rate=1e-3)


def rows_of(train: list[int], held_out: list[int] | None = None) -> Rows:
    """Examples of so many tokens, of which the first half is not trained."""

    def examples(lengths: list[int]) -> list[Tokens]:
        return [Tokens([7] * n, [IGNORED] * (n // 2) + [7] * (n - n // 2), [n]) for n in lengths]

    return Rows(pack(examples(train), 64), pack(examples(held_out), 64) if held_out else None, [])


def test_the_quantiles_are_lengths_that_occur():
    lengths = Lengths.of_rows(rows_of([10] * 50 + [20] * 40 + [30] * 9 + [64]))
    assert (lengths.quantiles, lengths.longest) == ([10, 20, 30], 64)
    assert lengths.values() | {"histogram": []} == {"p50": 10, "p90": 20, "p99": 30, "longest": 64, "histogram": []}


def test_every_example_is_in_one_bar():
    lengths = Lengths.of_rows(rows_of([2, 3, 4, 5, 8, 9, 64], [33, 64]))
    assert lengths.histogram == [(2, 2, 1), (3, 4, 2), (5, 8, 2), (9, 16, 1), (17, 32, 0), (33, 64, 3)]


def test_the_bars_are_in_proportion():
    lines = Lengths.of_rows(rows_of([3] * 40 + [8] * 10 + [20])).lines()
    assert lines[0] == "lengths in tokens, of all examples: 50% up to 3, 90% up to 8, 99% up to 20, the longest 20"
    assert [line.count("▇") for line in lines[1:]] == [40, 10, 0, 1]
    assert lines[1].startswith("      3 to 4  40 ▇") and lines[3] == "     9 to 16   0"


def test_packing_counts_examples_tokens_and_steps():
    packing = Packing.of_rows(rows_of([64, 32, 32, 21], [10, 10]), replace(TRAIN, epochs=3))
    assert packing == Packing(
        examples=4,
        held_out_examples=2,
        rows=3,
        seq_len=64,
        tokens=149,
        trained_tokens=32 + 16 + 16 + 11,
        rows_per_step=2,
        steps_per_epoch=2,
        steps=6,
    )
    assert packing.lines() == [
        "    a step has up to 128 tokens, of which about 38 are trained",
    ]


@pytest.mark.parametrize("held_out", [None, [5]])
def test_rows_that_are_held_out_are_counted_where_there_are_any(held_out):
    assert Packing.of_rows(rows_of([10], held_out), TRAIN).held_out_examples == len(held_out or [])
