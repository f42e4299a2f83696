"""Many tokenised examples, in little memory."""

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.tokens.chat_format import Tokens
from common.tokens.labels import IGNORED


class Examples:
    """A list of tokenised examples that takes 8 bytes a token: lists of Python integers take ten times that.

    documents: for each example, the number of the row that it comes from, from 0 on: a long text becomes several
    examples. hashes: of its token ids, 64 bits; equal ones mark exact copies. Of better and worse answers alone, marks:
    for each token, 1 where a chosen or good conversation begins, -1 where a rejected or bad one does, else 0; prompts:
    for each example, a hash of its prompt's token ids; opposites: the hash of an example that says the opposite, with
    the answers in the other order, or the other rating. Otherwise all three are empty.
    """

    def __init__(self, examples: Iterable[Tokens] = ()) -> None:
        self.input_ids, self.labels, self.ends = array("i"), array("i"), array("i", [0])
        self.documents, self.hashes = array("i"), array("Q")
        self.marks, self.prompts, self.opposites = array("b"), array("Q"), array("Q")
        for example in examples:
            self.append([example])

    def append(self, parts: Iterable[Tokens]) -> None:
        """Adds the examples that one row became."""
        document = self.document_count
        for part in parts:
            ids = array("i", part.input_ids)
            self.input_ids.extend(ids)
            self.labels.extend(part.labels)
            self.ends.append(len(self.input_ids))
            self.documents.append(document)
            self.hashes.frombytes(_hash(ids, part.signs))
            if part.signs:
                self.marks.extend(_marks(part))
                self.prompts.frombytes(_hash(part.prompt()))
                turned = [index for one in reversed(part.conversations()) for index in one.input_ids]
                self.opposites.frombytes(_hash(turned, [-sign for sign in reversed(part.signs)]))

    def extend(self, others: "Examples") -> None:
        """Adds others behind these. Their rows are other rows."""
        tokens, documents = len(self.input_ids), self.document_count
        self.input_ids.extend(others.input_ids)
        self.labels.extend(others.labels)
        self.ends.frombytes((view(others.ends)[1:] + np.int32(tokens)).tobytes())
        self.documents.frombytes((view(others.documents) + np.int32(documents)).tobytes())
        self.hashes.extend(others.hashes)
        self.marks.extend(others.marks)
        self.prompts.extend(others.prompts)
        self.opposites.extend(others.opposites)

    @property
    def document_count(self) -> int:
        return self.documents[-1] + 1 if self.documents else 0

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Tokens:
        start, end = self.ends[index : index + 2]
        marks = self.marks[start:end]
        begins = [place for place, mark in enumerate(marks) if mark]
        lengths = tuple(next_one - one for one, next_one in pairwise([*begins, end - start]))
        signs = tuple(marks[place] for place in begins)
        return Tokens(list(self.input_ids[start:end]), list(self.labels[start:end]), [], (), lengths, signs)

    def copies(self) -> int:
        """How many examples have the token ids of an earlier one."""
        return len(self) - len(np.unique(self.hash_view()))

    def hash_view(self) -> npt.NDArray[np.uint64]:
        """The hashes, over the same memory."""
        return np.frombuffer(self.hashes, dtype=np.uint64)

    def prompt_view(self) -> npt.NDArray[np.uint64]:
        """Equal for examples that are held out together or not at all: hashes of prompts, or without them of all."""
        return np.frombuffer(self.prompts or self.hashes, dtype=np.uint64)

    def trained_tokens(self) -> npt.NDArray[np.int64]:
        """For each example its number of trained tokens."""
        trained_before = np.concatenate([[0], np.cumsum(view(self.labels) != IGNORED)])
        return np.diff(trained_before[view(self.ends)])

    def table(self) -> pa.Table:
        """Returns columns input_ids and labels, lists of int32, over the same memory; with marks those too, int8."""
        ends = view(self.ends)
        columns = {"input_ids": view(self.input_ids), "labels": view(self.labels)}
        if self.marks:
            columns["marks"] = np.frombuffer(self.marks, dtype=np.int8)
        return pa.table({name: pa.ListArray.from_arrays(ends, values) for name, values in columns.items()})


def view(values: "array[int]") -> npt.NDArray[np.int32]:
    """The values, over the same memory."""
    return np.frombuffer(values, dtype=np.int32)


def _hash(ids: Iterable[int], signs: Iterable[int] = ()) -> bytes:
    """8 bytes. signs: of an answer that is rated otherwise the hash is another."""
    return blake2b(array("i", ids), digest_size=8, key=array("b", signs).tobytes()).digest()


def _marks(tokens: Tokens) -> list[int]:
    return [
        mark for sign, length in zip(tokens.signs, tokens.lengths, strict=True) for mark in (sign, *[0] * (length - 1))
    ]
