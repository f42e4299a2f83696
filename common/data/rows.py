"""Makes packed rows from a data source: reads, checks and tokenises its rows, holds some out, and packs the rest.

Rows that cannot be used are counted and named (common.data.report). The rows of large files are kept in a cache.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from common.data.cache import cache_folder, load_cached, save_cached
from common.data.chat_format import ChatFormat
from common.data.conversation import Example
from common.data.conversations import RowReader
from common.data.cutting import fit_example
from common.data.files import read_rows
from common.data.fingerprint import file_states, refuse_if_changed
from common.data.packing import Examples, count_shared, pack
from common.data.report import DataReport, mark_trained
from common.data.source_files import find_files, is_file
from common.data.source_row import BadRow, PreferenceData
from common.recipe import DataSpec, UserError

PROGRESS_SECONDS = 10.0  # between two lines of progress


@dataclass(frozen=True)
class Rows:
    """Packed rows. Columns: input_ids and labels, equally long; seq_lengths, the lengths of the examples in the row."""

    train: Dataset
    evaluation: Dataset | None
    reports: list[DataReport]  # of the source, and of eval_source where there is one

    @property
    def train_tokens(self) -> int:
        return sum(map(sum, self.train["seq_lengths"]))


def load_rows(spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int = 0) -> Rows:
    """Makes the packed rows to train and to evaluate on. Prints what was found, and one example.

    Raises UserError when the source cannot be read, changes meanwhile, or too many of its rows cannot be used.
    """
    states = file_states(spec)
    folder = cache_folder(spec, states, tokenizer, seq_len, seed)
    if folder is not None and (cached := _rows_from_cache(folder)) is not None:
        return cached
    sources = [(spec.source, spec.split)]
    if spec.eval_source is not None:
        sources.append((spec.eval_source, spec.eval_split))
    chat_format = ChatFormat(tokenizer, rendered=spec.rendered)
    try:
        tokenised = [tokenise_source(spec, source, split, chat_format, seq_len) for source, split in sources]
    except UserError:
        refuse_if_changed(states)  # half of a new file is often a damaged file, and this says what damaged it
        raise
    refuse_if_changed(states)
    reports = [report for _, report in tokenised]
    for report in reports:
        report.sha256 = state.sha256 if (state := states.get(report.source)) else None
    examples, training, held_out = tokenised[0][0], tokenised[0][0].table(), None
    if spec.eval_source is not None:
        held_out = tokenised[1][0].table()
    elif count := min(spec.eval_rows, len(examples) // 10):
        training, held_out = _hold_out(training, count, seed)
    rows = Rows(pack(training, seq_len), pack(held_out, seq_len) if held_out else None, reports)
    example = f"  for example: {mark_trained(examples[0], tokenizer)}"
    lines = [*_packing_lines(rows, training, held_out, seq_len), example]
    print("\n".join(lines))
    if folder is not None:
        metadata = {"lines": lines, "reports": [vars(report) for report in reports]}
        save_cached(folder, rows.train, rows.evaluation, metadata)
    return rows


def _packing_lines(rows: Rows, training: pa.Table, held_out: pa.Table | None, seq_len: int) -> list[str]:
    fill = f"{rows.train_tokens / (len(rows.train) * seq_len):.0%} full"
    held = f", {len(held_out):,} held out" if held_out else ""
    examples = f"{len(training):,} {'example' if len(training) == 1 else 'examples'}"
    packed = f"{len(rows.train):,} {'row' if len(rows.train) == 1 else 'rows'}"
    lines = [f"  {examples} packed into {packed} of {seq_len:,} tokens, {fill}{held}"]
    if held_out and (shared := count_shared(held_out, training)):
        lines.append(
            f"  warning: {shared:,} of the {len(held_out):,} held-out examples are also among the training ones: "
            "the held-out loss looks better than it is"
        )
    return lines


def _rows_from_cache(folder: Path) -> Rows | None:
    """Loads the rows that an earlier run made, and prints what it printed. None when there are none."""
    if (found := load_cached(folder)) is None:
        return None
    train, evaluation, metadata = found
    reports = [
        DataReport(**values | {"fault_counts": Counter(values["fault_counts"])}) for values in metadata["reports"]
    ]
    print("\n".join([*(line for report in reports for line in report.lines()), *metadata["lines"]]))
    print(f"  taken from {folder}: nothing has changed since they were tokenised")
    return Rows(train, evaluation, reports)


def tokenise_source(
    spec: DataSpec, source: str, split: str, chat_format: ChatFormat, seq_len: int
) -> tuple[Examples, DataReport]:
    """Tokenises every usable row of a source, into examples of at most seq_len tokens. Prints the report.

    Raises UserError as load_rows.
    """
    report, examples, printed_at = DataReport(source), Examples(), time.monotonic()
    for place, example in read_examples(
        source, report, split=split, revision=spec.revision, config=spec.config, columns=spec.columns
    ):
        if time.monotonic() - printed_at > PROGRESS_SECONDS:
            print(f"  {report.read:,} rows of {source} read, {report.tokens:,} tokens", flush=True)
            printed_at = time.monotonic()
        try:
            tokens = chat_format.encode(example, spec.train_on)
            parts = fit_example(example, tokens, seq_len, chat_format, spec.train_on)
        except BadRow as fault:
            report.add_fault(str(fault), place)
            continue
        report.kept += 1
        report.longest = max(report.longest, len(tokens.input_ids))
        report.truncated += len(tokens.input_ids) > seq_len
        for part in parts:
            report.add_tokens(part)
            examples.append(part)
    print("\n".join(report.lines()))
    report.refuse_if_bad(spec.max_bad_share)
    return examples, report


def read_examples(
    source: str,
    report: DataReport,
    *,
    split: str = "train",
    revision: str | None = None,
    config: str | None = None,
    columns: dict[str, str] | None = None,
) -> Iterable[tuple[str, Example]]:
    """Yields the usable rows of a source, each with its place. Adds the others to the report.

    Raises UserError for preference data.
    """
    reader = RowReader(columns=columns)
    if is_file(source) and (found := find_files(source)).saved is None:
        report.files, report.ignored = len(found.files), found.ignored
    for place, row in read_rows(
        source, split=split, revision=revision, config=config, columns=columns, unread=reader.unread
    ):
        report.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            example = reader.read(row)
        except PreferenceData as fault:
            raise UserError(f"{place}: {fault}") from fault
        except BadRow as fault:
            report.add_fault(str(fault), place)
        else:
            report.format_name = reader.format_name
            yield place, example


def _hold_out(examples: pa.Table, count: int, seed: int) -> tuple[pa.Table, pa.Table]:
    """Splits `count` random examples off. Returns the others, and these."""
    is_held_out = np.zeros(len(examples), dtype=bool)
    is_held_out[Random(seed).sample(range(len(examples)), count)] = True
    return examples.filter(~is_held_out), examples.filter(is_held_out)


def find_examples(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, wanted: list[list[int]]
) -> list[str]:
    """Returns the places of the examples with these token ids, in the order of the source.

    Reads the source again, until the last of them is found.
    """
    chat_format, missing, places = ChatFormat(tokenizer, rendered=spec.rendered), {tuple(ids) for ids in wanted}, []
    report = DataReport(spec.source)
    for place, example in read_examples(
        spec.source, report, split=spec.split, revision=spec.revision, config=spec.config, columns=spec.columns
    ):
        try:
            tokens = chat_format.encode(example, spec.train_on)
            parts = fit_example(example, tokens, seq_len, chat_format, spec.train_on)
        except BadRow:
            continue
        found = missing & {tuple(part.input_ids) for part in parts}
        missing -= found
        if found:
            places.append(place)
        if not missing:
            break
    return places
