"""What better and worse answers are like: how many there are of each, how long they are, what contradicts itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from common.data.examples import Examples
from common.data.mixing import Mask
from common.recipe import Kind
from common.tokens.chat_format import Tokens
from common.tokens.labels import IGNORED

SIGN_IN_WORDS: dict[Kind, dict[int, str]] = {
    "pairs": {1: "chosen", -1: "rejected"},
    "rated": {1: "rated good", -1: "rated bad"},
}


def answers_of(example: Tokens, kind: Kind) -> list[tuple[str, Tokens]]:
    """Each answer of an example behind its prompt, with what it is in words. A conversation alone has no word, ""."""
    if not example.signs:
        return [("", example)]
    return [
        (SIGN_IN_WORDS[kind][sign], tokens) for sign, tokens in zip(example.signs, example.conversations(), strict=True)
    ]


@dataclass(frozen=True)
class Balance:
    """Of the answers of packed rows: better ones, which are chosen or good, and worse ones, rejected or bad."""

    better: int
    worse: int
    better_tokens: int  # that are trained
    worse_tokens: int

    @classmethod
    def of_rows(cls, rows: Dataset) -> "Balance":
        """rows: with signs, of Rows."""
        table = rows.with_format("arrow")[:]
        labels, signs, lengths = (
            pc.list_flatten(table[name]).to_numpy() for name in ("labels", "signs", "seq_lengths")
        )
        trained_before = np.concatenate([[0], np.cumsum(labels != IGNORED)])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        trained = np.diff(trained_before[ends])
        better = signs > 0
        return cls(int(better.sum()), int((~better).sum()), int(trained[better].sum()), int(trained[~better].sum()))

    def lines(self, kind: Kind) -> list[str]:
        """How many there are and how long they are: where better answers are longer, a run learns to answer longer."""
        better, worse = ("chosen", "rejected") if kind == "pairs" else ("good", "bad")
        sides = [(self.better, self.better_tokens, better), (self.worse, self.worse_tokens, worse)]
        lengths = ", ".join(f"{tokens / count:,.0f} of a {word} one" for count, tokens, word in sides if count)
        counts = "" if kind == "pairs" else f"{self.better:,} good answers and {self.worse:,} bad ones; "
        lines = [f"  {counts}trained tokens, on average: {lengths}"]
        if 0 in (self.better, self.worse):
            lines.append(
                f"  warning: there is no {better if self.worse else worse} answer, so nothing says what the others are "
                "better or worse than"
            )
        return lines


def contradictions(sources: Sequence[Examples], used: Mask) -> list[str]:
    """A line where the same two answers stand in both orders, or the same answer is rated both ways. used: of all."""
    hashes = np.concatenate([source.hash_view() for source in sources])[used]
    opposites = np.concatenate([np.frombuffer(source.opposites, dtype=np.uint64) for source in sources])[used]
    count = int(np.isin(opposites, hashes).sum())
    if not count:
        return []
    examples = "1 example contradicts" if count == 1 else f"{count:,} examples contradict"
    return [f"  warning: {examples} another one: what is the better answer here is the worse one there"]
