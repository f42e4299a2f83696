"""Makes packed rows from the data sources of a recipe: tokenises, mixes and packs them, and holds some out.

The rows of large files are kept in a cache. Of several processes on a machine the first one makes the rows, and the
others read them from disk.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from common.data.balance import Balance, answers_of, contradictions
from common.data.cache import cache_folder, load_cached, remove_shared, save_cached, shared_folder
from common.data.examples import Examples
from common.data.packing import pack
from common.data.report import DataReport, mark_trained
from common.data.selection import Selection, describe_mixture, select
from common.data.tokenise import Tokeniser, chunked, rows_of, tokenise_source
from common.machine.collectives import barrier_on_machine, broadcast_on_machine
from common.machine.processes import local_rank, local_world_size
from common.recipe import DataSpec, Kind, UserError
from common.sources.fingerprint import FileStates, file_states, refuse_if_changed, refuse_shared_files
from common.tokens.chat_format import ChatFormat, Tokens
from common.tokens.labels import IGNORED

NAME_OF: dict[Kind, str] = {"conversations": "example", "pairs": "pair", "rated": "rated answer"}


@dataclass(frozen=True)
class Rows:
    """Packed rows. Columns: input_ids and labels, equally long; seq_lengths, the lengths of the examples in the row.

    Of better and worse answers (kind) an example is a pair, or a rated answer. seq_lengths are then those of the
    conversations, two of a pair, and one column more is there, signs: 1 for a chosen or good one, -1 for a rejected or
    bad one.
    """

    train: Dataset
    evaluation: Dataset | None
    reports: list[DataReport]  # of each source, and of eval_source where there is one
    example: Tokens | None = None  # the first one of the first source
    kind: Kind = "conversations"

    @property
    def conversations_per_example(self) -> int:
        return 2 if self.kind == "pairs" else 1

    @property
    def most_examples(self) -> int:
        """Examples in the training row that has the most, of pairs both answers."""
        chunks = self.train.with_format("arrow")["seq_lengths"].chunks
        return max((pc.max(pc.list_value_length(chunk)).as_py() for chunk in chunks if len(chunk)), default=0)

    @property
    def train_tokens(self) -> int:
        return sum(map(sum, self.train["seq_lengths"]))

    @property
    def trained_tokens(self) -> int:
        """Of an epoch: those of the training rows that the loss counts."""
        return count_trained_tokens(self.train)


def count_trained_tokens(rows: Dataset) -> int:
    """Of packed rows: how many labels the loss counts."""
    chunks = rows.with_format("arrow")["labels"].chunks
    return sum(int((chunk.flatten().to_numpy() != IGNORED).sum()) for chunk in chunks)


def load_rows(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int = 0, *, shows_example: bool = True
) -> Rows:
    """Makes the packed rows to train and to evaluate on. Prints what was found, and one example.

    Raises UserError when the source cannot be read, changes meanwhile, or too many of its rows cannot be used.
    """
    rows = _load_on_machine(spec, tokenizer, seq_len, seed)
    if shows_example and rows.example is not None:
        for word, tokens in answers_of(rows.example, rows.kind):
            print(f"  for example{word and f', {word}'}: {mark_trained(tokens, tokenizer)}")
    return rows


def _load_on_machine(spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int) -> Rows:
    """Of several processes on a machine the first one makes the rows, and the others read them from disk."""
    if local_world_size() == 1:
        return _load_here(spec, tokenizer, seq_len, seed)[0]
    rows, folder = None, None
    if local_rank() == 0:
        rows, folder = _load_here(spec, tokenizer, seq_len, seed, for_others=True)
    folder = broadcast_on_machine(folder)
    if rows is None and folder is not None and (found := load_cached(folder)) is not None:
        rows = _rows_of_entry(spec.kind, *found)
    barrier_on_machine()  # all have opened it
    if local_rank() == 0 and folder is not None:
        remove_shared(folder)
    return rows or _load_here(spec, tokenizer, seq_len, seed)[0]  # on a disk that is full, each makes its own


def _load_here(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int, *, for_others: bool = False
) -> tuple[Rows, Path | None]:
    """Takes the rows from the cache, or makes them. Returns the folder where they lie too.

    for_others: other processes will read that folder. None where the rows are in memory alone.
    """
    refuse_shared_files(spec)
    states = file_states(spec)
    folder = cache_folder(spec, states, tokenizer, seq_len, seed)
    if folder is not None and (found := load_cached(folder)) is not None:
        rows, lines = _rows_of_entry(spec.kind, *found), found[2]["lines"]
        print("\n".join([*(line for report in rows.reports for line in report.lines()), *lines]))
        print(f"  taken from {folder}: nothing has changed since they were tokenised")
        return rows, folder
    rows, lines = _make_rows(spec, states, tokenizer, seq_len, seed)
    if folder is None and for_others:
        folder = shared_folder()
    if folder is None:
        return rows, None
    metadata = {
        "lines": lines,
        "reports": [report.record() for report in rows.reports],
        "example": None if rows.example is None else asdict(rows.example),
    }
    is_saved = save_cached(folder, rows.train, rows.evaluation, metadata)
    if is_saved and (found := load_cached(folder)) is not None:
        return _rows_of_entry(
            spec.kind, *found
        ), folder  # these are mapped from disk, and leave the memory to the model
    return rows, None


def _rows_of_entry(kind: Kind, train: Dataset, evaluation: Dataset | None, metadata: dict[str, Any]) -> Rows:
    reports = [DataReport.from_record(record) for record in metadata["reports"]]
    return Rows(train, evaluation, reports, metadata["example"] and Tokens(**metadata["example"]), kind)


def _make_rows(
    spec: DataSpec, states: FileStates, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int
) -> tuple[Rows, list[str]]:
    """Makes the rows from the sources. Returns the lines too that it printed behind those of the reports."""
    sources = [(source, spec.split) for source, _ in spec.mixture]
    if spec.eval_source is not None:
        sources.append((spec.eval_source, spec.eval_split))
    chat_format = ChatFormat(tokenizer, rendered=spec.rendered)
    try:
        tokenised = [tokenise_source(spec, source, split, chat_format, seq_len) for source, split in sources]
    except UserError:
        refuse_if_changed(states)  # half of a new file is often a damaged file, and this says what damaged it
        raise
    refuse_if_changed(states)
    examples, reports = [found for found, _ in tokenised], [report for _, report in tokenised]
    for report in reports:
        report.sha256 = state.sha256 if (state := states.get(report.source)) else None
    own = examples.pop() if spec.eval_source is not None else None
    eval_rows = spec.eval_rows if own is None else 0
    selection = select(examples, [weight for _, weight in spec.mixture], eval_rows, seed)
    table = pa.concat_tables([source.table() for source in examples])
    train = pack(table, seq_len, selection.trained)
    evaluation = None
    if own is not None:
        evaluation = pack(own.table(), seq_len)
    elif selection.held_out.any():
        evaluation = pack(table, seq_len, selection.held_out)
    rows = Rows(train, evaluation, reports, examples[0][0], spec.kind)
    lines = describe_mixture(examples, reports[: len(examples)], selection) if len(examples) > 1 else []
    lines += _packing_lines(rows, selection, seq_len, own, eval_rows)
    if spec.kind != "conversations":
        lines += Balance.of_rows(train).lines(spec.kind) + contradictions(examples, selection.trained)
    if own is not None:
        lines += _leak_lines(own, examples, selection)
    print("\n".join(lines))
    return rows, lines


def _packing_lines(rows: Rows, selection: Selection, seq_len: int, own: Examples | None, eval_rows: int) -> list[str]:
    fill = f"{rows.train_tokens / (len(rows.train) * seq_len):.0%} full"
    count, held_out = int(selection.trained.sum()), int(selection.held_out.sum()) if own is None else len(own)
    held = f", {held_out:,} held out" if held_out else ""
    examples = f"{count:,} {NAME_OF[rows.kind]}{'' if count == 1 else 's'}"
    packed = f"{len(rows.train):,} {'row' if len(rows.train) == 1 else 'rows'}"
    lines = [f"  {examples} packed into {packed} of {seq_len:,} tokens, {fill}{held}"]
    if eval_rows and not held_out:
        lines.append(
            "  nothing is held out: at most a tenth of the examples would be, and a row is held out with its copies"
            + ("" if rows.kind == "conversations" else ", and with all that answer the same prompt")
        )
    return lines


def _leak_lines(own: Examples, sources: list[Examples], selection: Selection) -> list[str]:
    hashes = np.concatenate([source.prompt_view() for source in sources])[selection.trained]
    if not (shared := int(np.isin(own.prompt_view(), hashes).sum())):
        return []
    what = "answer a prompt that is also among" if own.prompts else "are also among"
    return [
        f"  warning: {shared:,} of the {len(own):,} held-out examples {what} the training ones: "
        "the held-out loss looks better than it is"
    ]


def find_examples(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, wanted: list[list[int]]
) -> list[str]:
    """Returns the places of the examples with these token ids, in the order of the sources.

    Reads the sources again, until the last of them is found.
    """
    chat_format = ChatFormat(tokenizer, rendered=spec.rendered)
    missing, places = {tuple(ids) for ids in wanted}, list[str]()
    for source, _ in spec.mixture:
        tokeniser = Tokeniser(source, chat_format, spec, seq_len)
        for rows in chunked(rows_of(spec, source, spec.split)):
            for place, parts in tokeniser.tokenise(rows, DataReport(source, seq_len)):
                if found := missing & {tuple(each.input_ids) for part in parts for each in part.conversations()}:
                    missing -= found
                    places.append(place)
            if not missing:
                return places
    return places
