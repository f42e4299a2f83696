"""Rows of any accepted format become packed rows of token ids and labels; what is left out is counted and named."""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from common.data import cache as row_cache
from common.data.chat_format import ChatFormat, Tokens
from common.data.conversations import Example, format_of, to_example
from common.data.files import BadRow, read_rows
from common.data.labels import IGNORED
from common.data.packing import Examples, pack
from common.recipe import DataSpec, UserError

PLACES_PER_FAULT = 5  # of each kind of fault
SAY_EVERY = 10.0  # seconds between two lines of progress


@dataclass
class DataReport:
    """What became of the rows of one source."""

    source: str
    format_name: str = ""
    read: int = 0
    kept: int = 0
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # kind -> first places
    fault_counts: Counter[str] = field(default_factory=Counter)
    truncated: int = 0  # conversations that lost their last turns, texts cut into several rows
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens, before anything was cut

    @property
    def dropped(self) -> int:
        return self.fault_counts.total()

    def add_fault(self, kind: str, place: str) -> None:
        self.fault_counts[kind] += 1
        if len(self.faults[kind]) < PLACES_PER_FAULT:
            self.faults[kind].append(place)

    def add_tokens(self, tokens: Tokens) -> None:
        self.tokens += len(tokens.input_ids)
        self.trained_tokens += sum(label != IGNORED for label in tokens.labels)

    def lines(self) -> list[str]:
        lines = [
            f"{self.source}: {self.read:,} rows read ({self.format_name}), {self.kept:,} kept, {self.dropped:,} dropped"
        ]
        for kind, count in self.fault_counts.most_common():
            more = f" and {count - PLACES_PER_FAULT:,} more" if count > PLACES_PER_FAULT else ""
            lines.append(f"  dropped {count:,}: {kind} ({'; '.join(self.faults[kind])}{more})")
        if self.tokens:
            share = self.trained_tokens / self.tokens
            lines.append(
                f"  {self.tokens:,} tokens, {share:.0%} trained; longest row {self.longest:,}; "
                f"{self.truncated:,} cut ({self.truncated / max(self.kept, 1):.1%})"
            )
        return lines

    def refuse_if_bad(self, limit: float) -> None:
        """Raises UserError when a larger share than `limit` was dropped, or nothing is left."""
        if not self.read:
            raise UserError(f"{self.source} holds no rows")
        if self.kept and self.dropped <= limit * self.read:
            return
        kind, count = self.fault_counts.most_common(1)[0]
        raise UserError(
            f"{self.dropped:,} of {self.read:,} rows of {self.source} cannot be used ({self.dropped / self.read:.1%}, "
            f"limit {limit:.1%}), most of them: {kind} ({self.faults[kind][0]}"
            f"{f' and {count - 1:,} more' if count > 1 else ''}). Mend them, or set DataSpec(max_bad_share=...)"
        )


@dataclass(frozen=True)
class Rows:
    """Packed rows. Columns: input_ids and labels (equally long), seq_lengths (of the examples in the row)."""

    train: Dataset
    evaluation: Dataset | None
    reports: list[DataReport]

    @property
    def train_tokens(self) -> int:
        return sum(map(sum, self.train["seq_lengths"]))


def load_rows(spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int = 0) -> Rows:
    """Reads, checks, tokenises, holds out and packs; prints what was found, with one example.

    Raises UserError when the source cannot be read, or too many of its rows cannot be used.
    """
    cached = row_cache.cache_folder(spec, tokenizer, seq_len, seed)
    if cached is not None and (found := row_cache.load_cached(cached)) is not None:
        train, evaluation, told = found
        reports = [DataReport(**r | {"fault_counts": Counter(r["fault_counts"])}) for r in told["reports"]]
        print("\n".join([*(line for r in reports for line in r.lines()), *told["lines"]]))
        print(f"  taken from {cached}: nothing has changed since they were tokenised")
        return Rows(train, evaluation, reports)
    chat_format = ChatFormat(tokenizer)
    examples, report = tokenise_source(spec, spec.source, spec.split, chat_format, seq_len)
    reports, training, held_out = [report], examples.table(), None
    if spec.eval_source is not None:
        evaluation_examples, eval_report = tokenise_source(
            spec, spec.eval_source, spec.eval_split, chat_format, seq_len
        )
        held_out = evaluation_examples.table()
        reports.append(eval_report)
    elif count := min(spec.eval_rows, len(examples) // 10):
        chosen = np.zeros(len(examples), dtype=bool)
        chosen[Random(seed).sample(range(len(examples)), count)] = True
        training, held_out = training.filter(~chosen), training.filter(chosen)
    train = pack(training, seq_len)
    rows = Rows(train, pack(held_out, seq_len) if held_out else None, reports)
    full = rows.train_tokens / (len(train) * seq_len)
    held = f", {len(held_out):,} held out" if held_out else ""
    lines = [
        f"  {len(training):,} examples packed into {len(train):,} rows of {seq_len:,} tokens, {full:.0%} full{held}",
        f"  for example: {mark_trained(examples[0], tokenizer)}",
    ]
    print("\n".join(lines))
    if cached is not None:
        row_cache.save_cached(cached, train, rows.evaluation, {"lines": lines, "reports": [vars(r) for r in reports]})
    return rows


def read_examples(source: str, report: DataReport, **place: Any) -> Iterable[tuple[str, Example]]:
    """The good rows of a source with their places; the others go into the report."""
    format_name = ""
    for where, row in read_rows(source, **place):
        report.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            format_name = format_name or format_of(row)
            report.format_name = format_name
            example = to_example(row, format_name)
        except BadRow as fault:
            report.add_fault(str(fault), where)
        else:
            yield where, example


def tokenise_source(
    spec: DataSpec, source: str, split: str, chat_format: ChatFormat, seq_len: int
) -> tuple[Examples, DataReport]:
    """Every usable example of a source, none longer than seq_len. Prints the report; raises UserError as load_rows."""
    report, kept, said_at = DataReport(source), Examples(), time.monotonic()
    for where, example in read_examples(source, report, split=split, revision=spec.revision):
        if time.monotonic() - said_at > SAY_EVERY:
            print(f"  {report.read:,} rows of {source} read, {report.tokens:,} tokens", flush=True)
            said_at = time.monotonic()
        try:
            tokens = chat_format.encode(example, spec.train_on)
            pieces = fit_to_row(tokens, seq_len, is_text=isinstance(example, str))
        except BadRow as fault:
            report.add_fault(str(fault), where)
            continue
        report.kept += 1
        report.longest = max(report.longest, len(tokens.input_ids))
        report.truncated += len(tokens.input_ids) > seq_len
        for piece in pieces:
            report.add_tokens(piece)
            kept.append(piece)
    print("\n".join(report.lines()))
    report.refuse_if_bad(spec.max_bad_share)
    return kept, report


def find_examples(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, wanted: list[list[int]]
) -> list[str]:
    """The places of the examples with these token ids, in the order of the source, which is read again to the last."""
    chat_format, left, places = ChatFormat(tokenizer), {tuple(ids) for ids in wanted}, []
    for where, example in read_examples(spec.source, DataReport(spec.source), split=spec.split, revision=spec.revision):
        try:
            pieces = fit_to_row(chat_format.encode(example, spec.train_on), seq_len, is_text=isinstance(example, str))
        except BadRow:
            continue
        found = left & {tuple(piece.input_ids) for piece in pieces}
        left -= found
        places += [where] if found else []
        if not left:
            break
    return places


def fit_to_row(tokens: Tokens, seq_len: int, *, is_text: bool) -> list[Tokens]:
    """The example in pieces of at most seq_len tokens, without cutting an answer.

    A conversation keeps the turns that fit whole; a plain text is cut into as many pieces as it takes.
    Raises BadRow when not even the first answer of a conversation fits.
    """
    if len(tokens.input_ids) <= seq_len:
        return [tokens]
    if is_text:
        starts = range(0, len(tokens.input_ids), seq_len)
        cut = [(tokens.input_ids[i : i + seq_len], tokens.labels[i : i + seq_len]) for i in starts]
        return [Tokens(ids, [IGNORED, *labels[1:]], [len(ids)]) for ids, labels in cut if len(ids) > 1]
    whole = [end for end in tokens.turn_ends if end <= seq_len]
    if not whole:
        raise BadRow(f"its first answer ends after {seq_len:,} tokens (TrainSpec.seq_len)")
    return [Tokens(tokens.input_ids[: whole[-1]], tokens.labels[: whole[-1]], whole)]


def mark_trained(tokens: Tokens, tokenizer: PreTrainedTokenizerFast, limit: int = 60) -> str:
    """The example as text, trained tokens marked: underlined on a terminal, else between ⟦ and ⟧."""
    on, off = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    first = next((i for i, label in enumerate(tokens.labels) if label != IGNORED), 0)
    start = max(0, first - limit)
    ids, labels = tokens.input_ids[start : first + limit], tokens.labels[start : first + limit]
    text, runs = "…" if start else "", 0
    while runs < len(ids):
        trained = labels[runs] != IGNORED
        end = next((i for i in range(runs, len(ids)) if (labels[i] != IGNORED) != trained), len(ids))
        piece = tokenizer.decode(ids[runs:end]).replace("\n", "⏎")
        text += on + piece + off if trained else piece
        runs = end
    return text + ("…" if first + limit < len(tokens.input_ids) else "")
