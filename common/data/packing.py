"""Packs tokenised examples into rows of at most seq_len tokens."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl import pack_dataset

from common.data.chat_format import Tokens
from common.data.labels import IGNORED
from common.data.source_row import BadRow


def fit_to_row(tokens: Tokens, seq_len: int, *, is_text: bool) -> list[Tokens]:
    """Shortens a conversation, or splits a plain text, to at most seq_len tokens. No answer is cut.

    A conversation keeps the turns that fit whole. Raises BadRow when not even its first answer fits.
    """
    if len(tokens.input_ids) <= seq_len:
        return [tokens]
    if is_text:
        starts = range(0, len(tokens.input_ids), seq_len)
        parts = [(tokens.input_ids[i : i + seq_len], tokens.labels[i : i + seq_len]) for i in starts]
        # Of a part of one token nothing could be trained: its first token has no token before it.
        return [Tokens(ids, [IGNORED, *labels[1:]], [len(ids)]) for ids, labels in parts if len(ids) > 1]
    fitting_turn_ends = [end for end in tokens.turn_ends if end <= seq_len]
    if not fitting_turn_ends:
        raise BadRow(f"its first answer ends after {seq_len:,} tokens (TrainSpec.seq_len)")
    end = fitting_turn_ends[-1]
    return [Tokens(tokens.input_ids[:end], tokens.labels[:end], fitting_turn_ends)]


class Examples:
    """A list of tokenised examples that takes 8 bytes a token: lists of Python integers take ten times that."""

    def __init__(self, examples: Iterable[Tokens] = ()) -> None:
        self.input_ids, self.labels, self.ends = array("i"), array("i"), array("i", [0])
        for example in examples:
            self.append(example)

    def append(self, example: Tokens) -> None:
        self.input_ids.extend(example.input_ids)
        self.labels.extend(example.labels)
        self.ends.append(len(self.input_ids))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Tokens:
        start, end = self.ends[index : index + 2]
        return Tokens(list(self.input_ids[start:end]), list(self.labels[start:end]), [])

    def table(self) -> pa.Table:
        """Returns columns input_ids and labels, lists of int32, over the same memory."""
        ends = np.frombuffer(self.ends, dtype=np.int32)
        return pa.table(
            {
                name: pa.ListArray.from_arrays(ends, np.frombuffer(values, dtype=np.int32))
                for name, values in (("input_ids", self.input_ids), ("labels", self.labels))
            }
        )


def count_shared(examples: pa.Table, others: pa.Table) -> int:
    """Returns how many of the examples have the token ids of one of the others. Both as Examples.table."""
    known = Counter(_ids_as_bytes(examples))
    return sum(known.pop(ids, 0) for ids in _ids_as_bytes(others))


def _ids_as_bytes(table: pa.Table) -> Iterator[bytes]:
    for chunk in table["input_ids"].chunks:
        values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        for start, end in pairwise(offsets):
            yield values[start:end].tobytes()


def pack(examples: pa.Table | Sequence[Tokens], seq_len: int) -> Dataset:
    """Packs whole examples into rows of at most seq_len tokens, by best-fit decreasing (TRL's "bfd").

    Columns of the result: input_ids and labels, and seq_lengths, the lengths of the examples in the row.
    """
    table = examples if isinstance(examples, pa.Table) else Examples(examples).table()
    return pack_dataset(Dataset(table), seq_len, strategy="bfd")
