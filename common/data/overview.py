"""What people and machines are told of a run's data beside its reports: lengths, steps, examples."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from common.data.balance import Balance, answers_of
from common.data.look import Look
from common.data.rows import Rows
from common.data.sample import DrawnExample
from common.data.steps import count_steps, settle_rows_per_step, steps_per_epoch
from common.data.trained_text import lay_out, trained_pieces
from common.recipe import Kind, Recipe, TrainSpec
from common.tokens.labels import IGNORED

SHARES = (0.5, 0.9, 0.99)  # of the examples, of which is said how long they are at most
BAR_CHARACTERS = 40  # of the longest one


@dataclass(frozen=True)
class Lengths:
    """How long the examples are as they are trained, in tokens: those of the training rows and the held-out ones.

    quantiles: for each of SHARES, a length that so many of them have at most. histogram: from, to (both included) and
    the number of examples; the lengths double from one to the next.
    """

    quantiles: list[int]
    longest: int
    histogram: list[tuple[int, int, int]]

    @classmethod
    def of_rows(cls, rows: Rows) -> "Lengths":
        packed = [rows.train] if rows.evaluation is None else [rows.train, rows.evaluation]
        every = [length for part in packed for length in chain.from_iterable(part["seq_lengths"])]
        lengths = np.sort(np.reshape(every, (-1, rows.conversations_per_example)).sum(axis=1))
        quantiles = np.quantile(lengths, SHARES, method="inverted_cdf")
        exponents, counts = np.unique(np.ceil(np.log2(lengths)).astype(int), return_counts=True)
        by_exponent = dict(zip(exponents.tolist(), counts.tolist(), strict=True))
        histogram = [
            (2**e // 2 + 1, 2**e, by_exponent.get(e, 0)) for e in range(int(exponents[0]), int(exponents[-1]) + 1)
        ]
        return cls(quantiles.tolist(), int(lengths[-1]), histogram)

    def lines(self) -> list[str]:
        shares = [f"{share:.0%} up to {length:,}" for share, length in zip(SHARES, self.quantiles, strict=True)]
        most = max(count for *_, count in self.histogram)
        table = [(f"{low:,} to {high:,}", f"{count:,}", count) for low, high, count in self.histogram]
        widths = max(len(span) for span, *_ in table), max(len(number) for _, number, _ in table)
        return [
            f"lengths in tokens, of all examples: {', '.join(shares)}, the longest {self.longest:,}",
            *(
                f"    {span:>{widths[0]}}  {number:>{widths[1]}} {'▇' * round(BAR_CHARACTERS * count / most)}".rstrip()
                for span, number, count in table
            ),
        ]

    def values(self) -> dict[str, Any]:
        return {
            **{f"p{share * 100:.0f}": length for share, length in zip(SHARES, self.quantiles, strict=True)},
            "longest": self.longest,
            "histogram": [{"from": low, "to": high, "examples": count} for low, high, count in self.histogram],
        }


@dataclass(frozen=True)
class Packing:
    """What the rows are packed into, and the optimizer steps that this makes."""

    examples: int  # that are trained
    held_out_examples: int
    rows: int  # that are trained
    seq_len: int  # tokens that a row has room for
    tokens: int  # of the examples that are trained
    trained_tokens: int
    rows_per_step: int
    steps_per_epoch: int
    steps: int  # of the run

    @classmethod
    def of_rows(cls, rows: Rows, train: TrainSpec) -> "Packing":
        count = len(rows.train)
        train = settle_rows_per_step(train, count)
        return cls(
            examples=_count_examples(rows, rows.train),
            held_out_examples=0 if rows.evaluation is None else _count_examples(rows, rows.evaluation),
            rows=count,
            seq_len=train.seq_len,
            tokens=rows.train_tokens,
            trained_tokens=rows.trained_tokens,
            rows_per_step=train.most_rows_per_step,
            steps_per_epoch=steps_per_epoch(count, train),
            steps=count_steps(count, train),
        )

    def lines(self) -> list[str]:
        trained = self.trained_tokens / self.steps_per_epoch
        return [
            f"    a step has up to {self.rows_per_step * self.seq_len:,} tokens, of which about {trained:,.0f} are "
            "trained",
        ]


def _count_examples(rows: Rows, packed: Dataset) -> int:
    return sum(map(len, packed["seq_lengths"])) // rows.conversations_per_example


def example_lines(
    examples: Sequence[DrawnExample], tokenizer: PreTrainedTokenizerFast, kind: Kind, *, on_terminal: bool
) -> list[str]:
    """Each example as text, under a line that says where it stands, and an empty line after it."""
    lines = []
    for number, example in enumerate(examples, 1):
        tokens = example.tokens
        trained = sum(label != IGNORED for label in tokens.labels)
        there = "".join(f"; {word}" for word in sorted(example.peculiarities))
        lines.append(f"example {number}, {example.place}: {len(tokens.input_ids):,} tokens, {trained:,} trained{there}")
        for word, answer in answers_of(tokens, kind):
            lines += [f"  {word}:"] if word else []
            lines += lay_out(trained_pieces(answer, tokenizer), on_terminal=on_terminal)
        lines.append("")
    return lines


def overview_values(recipe: Recipe, look: Look, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """All of it for machines: docs/data.md describes the keys."""
    return {
        "model": recipe.model.name,
        "data": asdict(recipe.data),
        "seq_len": recipe.train.seq_len,
        "seed": recipe.train.seed,
        "refused": None if look.refusal is None else str(look.refusal),
        "reports": [report.record() | {"dropped": report.dropped} for report in look.reports],
        "packing": None if look.rows is None else asdict(Packing.of_rows(look.rows, recipe.train)),
        "lengths": None if look.rows is None else Lengths.of_rows(look.rows).values(),
        "answers": _balance_values(look.rows),
        "examples": [_example_values(example, tokenizer, recipe.data.kind) for example in look.examples],
    }


def _balance_values(rows: Rows | None) -> dict[str, Any] | None:
    return None if rows is None or rows.kind == "conversations" else asdict(Balance.of_rows(rows.train))


def _example_values(example: DrawnExample, tokenizer: PreTrainedTokenizerFast, kind: Kind) -> dict[str, Any]:
    answers = [(word, trained_pieces(tokens, tokenizer)) for word, tokens in answers_of(example.tokens, kind)]
    pieces = [piece for _, several in answers for piece in several]
    return {
        "place": example.place,
        "tokens": len(example.tokens.input_ids),
        "trained_tokens": sum(label != IGNORED for label in example.tokens.labels),
        "peculiarities": sorted(example.peculiarities),
        "notes": list(example.tokens.notes),
        "text": "".join(text for text, _ in pieces),
        "pieces": [{"text": text, "trained": is_trained} for text, is_trained in pieces],
        "answers": [{"is": word, "text": "".join(text for text, _ in several)} for word, several in answers if word],
    }
