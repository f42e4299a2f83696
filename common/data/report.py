"""What is printed about the rows of a data source: how many were used, which were not and why, and one example."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from common.data.lengths import fit_line, shortest_fit
from common.data.packing import TooLong
from common.data.tally import Tally
from common.data.trained_text import escape, trained_pieces
from common.recipe import UserError
from common.sources.source_row import BadRow, NotToLearn
from common.tokens.chat_format import Tokens
from common.tokens.labels import IGNORED


class UnusableRows(UserError):
    """Too many rows of a source cannot be used. report: what was found in it."""

    def __init__(self, message: str, report: "DataReport") -> None:
        super().__init__(message)
        self.report = report


@dataclass
class DataReport:
    """Counts the rows of one source, and names the first places of what was not used."""

    source: str
    seq_len: int = 1  # tokens of a packed row
    files: int = 1
    ignored: tuple[str, ...] = ()  # names of what else lies in the source's folder
    format_name: str = ""
    read: int = 0  # rows of the source
    kept: int = 0  # rows that can be trained or evaluated on
    faults: Tally = field(default_factory=Tally)  # rows that cannot be read or rendered
    too_long: Tally = field(default_factory=Tally)  # rows whose first answer does not fit
    not_to_learn: Tally = field(default_factory=Tally)  # rows that say so themselves
    unread: Counter[str] = field(default_factory=Counter)  # rows by a column or field of theirs that was not used
    notes: Counter[str] = field(default_factory=Counter)  # rows by what a user should know of them
    lengths: Counter[int] = field(default_factory=Counter)  # rows, also too long ones, by shortest_fit
    truncated: int = 0  # rows: conversations that lost their last turns, and texts that were split
    split: int = 0  # of these, those that became several examples
    left_out: int = 0  # tokens of rows that are kept: turns that do not fit
    copies: int = 0  # examples with the token ids of an earlier one
    tokens: int = 0  # of the rows that are kept, after truncation
    trained_tokens: int = 0
    longest: int = 0  # tokens of the longest row, before truncation
    mixed: int | None = None  # rows that a mixture takes; None where the source is not mixed
    mixed_share: float | None = None  # of the mixture's trained tokens
    mixed_copies: int | None = None  # examples of the mixture that are in an earlier source of it too
    sha256: str | None = None  # of the files (SourceState); None for a data set of the hub

    @property
    def dropped(self) -> int:
        return self.faults.total

    def add_unused(self, fault: BadRow, place: str) -> None:
        """Counts a row that is not used."""
        kinds = {TooLong: self.too_long, NotToLearn: self.not_to_learn}
        tally = next((tally for kind, tally in kinds.items() if isinstance(fault, kind)), self.faults)
        tally.add(str(fault), [place])

    def add_length(self, tokens: int) -> None:
        """Counts the length of a row that could be tokenised."""
        self.lengths[shortest_fit(tokens, self.seq_len)] += 1
        self.longest = max(self.longest, tokens)

    def add_kept(self, whole: Tokens, parts: list[Tokens]) -> None:
        """Counts a row. whole: as it was tokenised; parts: the examples that it became."""
        self.kept += 1
        self.truncated += len(whole.input_ids) > self.seq_len
        self.split += len(parts) > 1
        self.left_out += len(whole.input_ids) - sum(len(part.input_ids) for part in parts)
        self.notes.update(set(whole.notes))
        for part in parts:
            self.tokens += len(part.input_ids)
            self.trained_tokens += len(part.labels) - part.labels.count(IGNORED)

    def merge(self, later: "DataReport") -> None:
        """Adds what was counted of rows that stand behind these in the same source."""
        self.format_name = self.format_name or later.format_name
        self.longest = max(self.longest, later.longest)
        for name in ("read", "kept", "truncated", "split", "left_out", "copies", "tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in COUNTERS:
            getattr(self, name).update(getattr(later, name))
        for name in TALLIES:
            getattr(self, name).merge(getattr(later, name))

    def lines(self) -> list[str]:
        """Returns the report as it is printed."""
        named = f" ({self.format_name})" if self.format_name else ""  # no row told
        files = f"{self.files:,} files, " if self.files > 1 else ""
        read = f"{self.read:,} {_row_or_rows(self.read)} read"
        line = f"{self.source}: {files}{read}{named}, {self.kept:,} kept, {self.dropped:,} dropped"
        line += f", {self.too_long.total:,} too long" if self.too_long.total else ""
        line += f", {self.not_to_learn.total:,} not to be learnt" if self.not_to_learn.total else ""
        lines = [line]
        if self.ignored:
            lines.append(f"  not read, for they are no data files: {', '.join(self.ignored):.200}")
        lines += self.faults.lines("dropped")
        lines += [*self.too_long.lines("too long"), *self.not_to_learn.lines("not to be learnt")]
        if fitting := fit_line(self.lengths, self.seq_len):
            lines.append(f"  whole at TrainSpec.seq_len = {fitting}")
        if self.unread:
            names = [f"{name} ({count:,} {_row_or_rows(count)})" for name, count in sorted(self.unread.items())]
            lines.append(f"  not read: {', '.join(names)}")
        lines += [f"  {count:,} {_row_or_rows(count)}: {note}" for note, count in self.notes.most_common()]
        if self.copies:
            copies = "example is an exact copy" if self.copies == 1 else "examples are exact copies"
            lines.append(f"  {self.copies:,} {copies} of another one")
        if self.tokens:
            share = self.trained_tokens / self.tokens
            lines.append(
                f"  {self.tokens:,} tokens, {share:.0%} trained; longest row {self.longest:,}; "
                f"{self.truncated:,} cut ({self.truncated / max(self.kept, 1):.1%})"
                + (f", which leaves out {self.left_out:,} tokens" if self.left_out else "")
            )
        if self.split:
            texts = "text is" if self.split == 1 else "texts are"
            lines.append(
                f"  {self.split:,} {texts} longer than a row, and split over several; "
                "DataSpec(long_texts='drop') leaves such texts out"
            )
        return lines

    def refuse_unusable(self, max_bad_share: float, max_long_share: float) -> None:
        """Raises UserError when a larger share of the rows was dropped or is too long, or none is left."""
        if not self.read:
            raise UserError(f"{self.source} holds no rows")
        if self._is_over(self.faults, max_bad_share):
            raise UserError(
                f"{self._share_of(self.faults, 'cannot be used', max_bad_share)}, most of them: "
                f"{self.faults.most_frequent()}. Mend them, or set DataSpec(max_bad_share=...)"
            )
        if self._is_over(self.too_long, max_long_share):
            raise UserError(
                f"{self._share_of(self.too_long, 'are too long', max_long_share)}: {self.too_long.most_frequent()}. "
                f"Whole at TrainSpec.seq_len = {fit_line(self.lengths, self.seq_len)}. "
                "Raise it, or set DataSpec(max_long_share=...)"
            )
        if not self.kept:
            raise UserError(
                f"{self.source} says of all its rows not to learn them: {self.not_to_learn.most_frequent()}"
            )

    def _is_over(self, tally: Tally, limit: float) -> bool:
        return tally.total > limit * self.read or (not self.kept and tally.total > 0)

    def _share_of(self, tally: Tally, what: str, limit: float) -> str:
        rows = f"{tally.total:,} of {self.read:,} {_row_or_rows(self.read)} of {self.source}"
        return f"{rows} {what} ({tally.total / self.read:.1%}, limit {limit:.1%})"

    def record(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return vars(self) | {name: vars(getattr(self, name)) for name in TALLIES}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "DataReport":
        """The report that `record` gave."""
        values: dict[str, Any] = {name: Counter(record[name]) for name in COUNTERS}
        values["lengths"] = Counter({int(length): count for length, count in record["lengths"].items()})
        values |= {name: Tally(Counter(record[name]["counts"]), record[name]["places"]) for name in TALLIES}
        return cls(**record | values | {"ignored": tuple(record["ignored"])})


TALLIES = ("faults", "too_long", "not_to_learn")
COUNTERS = ("unread", "notes", "lengths")


def _row_or_rows(count: int) -> str:
    return "row" if count == 1 else "rows"


def mark_trained(tokens: Tokens, tokenizer: PreTrainedTokenizerFast, limit: int = 60) -> str:
    """Decodes up to `limit` tokens before and after the first trained one, with the trained text marked.

    Trained text is underlined on a terminal; elsewhere it stands between ⟦ and ⟧. Characters that a terminal would obey
    instead of showing them are escaped.
    """
    on, off = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    first_trained = next((i for i, label in enumerate(tokens.labels) if label != IGNORED), 0)
    start, stop = max(0, first_trained - limit), first_trained + limit
    shown = Tokens(tokens.input_ids[start:stop], tokens.labels[start:stop], [])
    text = "…" if start else ""
    for piece, is_trained in trained_pieces(shown, tokenizer):
        line = escape(piece.replace("\n", "⏎"))
        text += f"{on}{line}{off}" if is_trained else line
    return text + ("…" if stop < len(tokens.input_ids) else "")
