"""What is printed about the rows of a data source: how many were used, which were not and why, and one example."""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerFast

from common.data.chat_format import Tokens
from common.data.labels import IGNORED
from common.data.trained_text import escape
from common.recipe import UserError

MAX_PLACES_PER_FAULT = 5  # that are printed


class UnusableRows(UserError):
    """Too many rows of a source cannot be used. report: what was found in it."""

    def __init__(self, message: str, report: "DataReport") -> None:
        super().__init__(message)
        self.report = report


@dataclass
class DataReport:
    """Counts the rows of one source, and names the first places of each kind of fault."""

    source: str
    format_name: str = ""
    read: int = 0  # rows of the source
    kept: int = 0  # rows that are trained or evaluated on
    faults: dict[str, list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )  # from the kind of fault to its first places
    fault_counts: Counter[str] = field(default_factory=Counter)
    truncated: int = 0  # rows: conversations that lost their last turns, and texts that were split
    tokens: int = 0  # of the rows that are kept, after truncation
    trained_tokens: int = 0
    longest: int = 0  # tokens of the longest row, before truncation
    sha256: str | None = None  # of the file; None for a data set of the hub

    @property
    def dropped(self) -> int:
        return self.fault_counts.total()

    def add_fault(self, kind: str, place: str) -> None:
        self.fault_counts[kind] += 1
        if len(self.faults[kind]) < MAX_PLACES_PER_FAULT:
            self.faults[kind].append(place)

    def add_tokens(self, tokens: Tokens) -> None:
        self.tokens += len(tokens.input_ids)
        self.trained_tokens += sum(label != IGNORED for label in tokens.labels)

    def lines(self) -> list[str]:
        """Returns the report as it is printed."""
        named = f" ({self.format_name})" if self.format_name else ""  # no row told
        lines = [f"{self.source}: {self.read:,} rows read{named}, {self.kept:,} kept, {self.dropped:,} dropped"]
        for kind, count in self.fault_counts.most_common():
            more = f" and {count - MAX_PLACES_PER_FAULT:,} more" if count > MAX_PLACES_PER_FAULT else ""
            lines.append(f"  dropped {count:,}: {kind} ({'; '.join(self.faults[kind])}{more})")
        if self.tokens:
            share = self.trained_tokens / self.tokens
            lines.append(
                f"  {self.tokens:,} tokens, {share:.0%} trained; longest row {self.longest:,}; "
                f"{self.truncated:,} cut ({self.truncated / max(self.kept, 1):.1%})"
            )
        return lines

    def record(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return vars(self) | {"dropped": self.dropped}

    def refuse_if_bad(self, limit: float) -> None:
        """Raises UnusableRows when a larger share of the rows than `limit` was dropped, or none is left."""
        if not self.read:
            raise UnusableRows(f"{self.source} holds no rows", self)
        if self.kept and self.dropped <= limit * self.read:
            return
        kind, count = self.fault_counts.most_common(1)[0]
        raise UnusableRows(
            f"{self.dropped:,} of {self.read:,} rows of {self.source} cannot be used ({self.dropped / self.read:.1%}, "
            f"limit {limit:.1%}), most of them: {kind} ({self.faults[kind][0]}"
            f"{f' and {count - 1:,} more' if count > 1 else ''}). Mend them, or set DataSpec(max_bad_share=...)",
            self,
        )


def mark_trained(tokens: Tokens, tokenizer: PreTrainedTokenizerFast, limit: int = 60) -> str:
    """Decodes up to `limit` tokens before and after the first trained one, with the trained text marked.

    Trained text is underlined on a terminal; elsewhere it stands between ⟦ and ⟧. Characters that a terminal would obey
    instead of showing them are escaped.
    """
    on, off = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    first_trained = next((i for i, label in enumerate(tokens.labels) if label != IGNORED), 0)
    start, stop = max(0, first_trained - limit), first_trained + limit
    shown = zip(tokens.input_ids[start:stop], tokens.labels[start:stop], strict=True)
    text = "…" if start else ""
    for is_trained, run in groupby(shown, key=lambda pair: pair[1] != IGNORED):
        decoded = tokenizer.decode([token for token, _ in run]).replace("\n", "⏎")
        piece = escape(decoded)
        text += f"{on}{piece}{off}" if is_trained else piece
    return text + ("…" if stop < len(tokens.input_ids) else "")
