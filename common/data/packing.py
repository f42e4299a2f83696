"""Fits tokenised examples into rows of at most seq_len tokens: cuts, splits and packs them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from trl import pack_dataset

from common.data.examples import Examples
from common.sources.source_row import BadRow
from common.tokens.chat_format import Tokens
from common.tokens.labels import IGNORED

# Tokens that are packed in one go. A group leaves a few rows at its end half empty, and takes 16 bytes a token while
# it is packed: 256 MiB.
GROUP_TOKENS = 1 << 24


class TooLong(BadRow):
    """A conversation whose first answer does not fit a row: no fault of the data, so it is counted apart."""


def fit_to_row(tokens: Tokens, seq_len: int, *, is_text: bool) -> list[Tokens]:
    """Shortens a conversation, or splits a plain text, to at most seq_len tokens. No answer is cut.

    A conversation keeps the turns that fit whole, from its beginning, up to the last one that is trained. Raises
    TooLong when not even its first answer fits.
    """
    if len(tokens.input_ids) <= seq_len:
        return [tokens]
    if is_text:
        starts = range(0, len(tokens.input_ids), seq_len)
        parts = [(tokens.input_ids[i : i + seq_len], tokens.labels[i : i + seq_len]) for i in starts]
        # Of a part of one token nothing could be trained: its first token has no token before it.
        return [Tokens(ids, [IGNORED, *labels[1:]], [len(ids)], tokens.notes) for ids, labels in parts if len(ids) > 1]
    fitting_turn_ends = [end for end in tokens.turn_ends if end <= seq_len and tokens.labels[end - 1] != IGNORED]
    if not fitting_turn_ends:
        raise TooLong(f"its first answer ends after {seq_len:,} tokens (TrainSpec.seq_len)")
    end = fitting_turn_ends[-1]
    return [Tokens(tokens.input_ids[:end], tokens.labels[:end], fitting_turn_ends, tokens.notes)]


def pack(examples: pa.Table | Sequence[Tokens], seq_len: int, chosen: npt.NDArray[np.bool_] | None = None) -> Dataset:
    """Packs whole examples into rows of at most seq_len tokens, by best-fit decreasing (TRL's "bfd").

    examples: as Examples.table. chosen: which of them; None packs all, else at least one. Columns of the result:
    input_ids and labels, and seq_lengths, the lengths of the examples in the row. Of better and worse answers,
    seq_lengths are those of the conversations, and signs says of each 1 or -1 (Tokens); the two of a pair follow each
    other. Up to GROUP_TOKENS tokens are packed as one group, more in several.
    """
    table = examples if isinstance(examples, pa.Table) else Examples(examples).table()
    tokens = pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
    bounds = np.linspace(0, len(table), max(1, round(tokens / GROUP_TOKENS)) + 1).astype(int).tolist()
    groups = []
    for start, end in pairwise(bounds):
        group = table.slice(start, end - start)
        if chosen is not None:
            group = group.filter(pa.array(chosen[start:end]))
        if len(group):
            groups.append(_pack_group(group, seq_len))
    return concatenate_datasets(groups)


def _pack_group(examples: pa.Table, seq_len: int) -> Dataset:
    whole = Dataset(examples, fingerprint="examples")  # otherwise datasets hashes them all, for a cache it does not use
    # In groups of 1,000, TRL's default, it takes 0.4 to 1.2 % more rows.
    packed = pack_dataset(whole, seq_len, strategy="bfd", map_kwargs={"batch_size": len(examples)})
    return _read_marks(packed) if "marks" in packed.column_names else packed


def _read_marks(packed: Dataset) -> Dataset:
    """Puts signs in the place of marks, and the lengths of conversations in the place of those of examples."""
    table = packed.with_format("arrow")[:]
    column = table["marks"].combine_chunks()
    marks, row_ends = column.flatten().to_numpy(), np.concatenate([[0], np.cumsum(pc.list_value_length(column))])
    (begins,) = marks.nonzero()
    ends = np.searchsorted(begins, row_ends).astype(np.int32)
    lengths = np.diff(begins, append=len(marks)).astype(np.int32)
    table = table.drop_columns(["marks", "seq_lengths"]).replace_schema_metadata()  # which names the columns
    for name, values in (("seq_lengths", lengths), ("signs", marks[begins])):
        table = table.append_column(name, pa.ListArray.from_arrays(ends, values))
    return Dataset(table, fingerprint="answers")
