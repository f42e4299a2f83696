import random
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from trl import pack_dataset

from common.conversations.conversation import Conversation, Message
from common.data import packing
from common.data.examples import Examples
from common.data.packing import fit_to_row, pack
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat, Tokens
from common.tokens.labels import IGNORED


def tokens(length: int, first: int = 10) -> Tokens:
    ids = list(range(first, first + length))
    return Tokens(ids, [IGNORED, *ids[1:]], [length])


def test_packed_rows_hold_every_token_once():
    lengths = [50, 3, 64, 20, 31, 7, 7, 40, 64, 1, 12]
    examples = [tokens(length, first=100 * n) for n, length in enumerate(lengths)]
    packed = pack(examples, 64)
    assert all(len(row["input_ids"]) == sum(row["seq_lengths"]) <= 64 for row in packed)
    assert sorted(sum(packed["input_ids"], [])) == sorted(token for e in examples for token in e.input_ids)
    assert sum(len(row["labels"]) for row in packed) == sum(lengths)
    assert len(packed) == 5  # 299 tokens need at least 4.7 rows: best fit leaves almost nothing empty


def test_pitfall_7_a_long_conversation_keeps_whole_turns(tokenizer):
    chat = tuple(
        Message(role, f"{role} says a few words in turn {turn}") for turn in range(6) for role in ("user", "assistant")
    )
    whole = ChatFormat(tokenizer).encode(Conversation(chat))
    (cut,) = fit_to_row(whole, whole.turn_ends[2] + 5, is_text=False)
    assert len(cut.input_ids) == whole.turn_ends[2]
    assert cut.input_ids[-1] == cut.labels[-1] == tokenizer.eos_token_id
    with pytest.raises(BadRow, match="its first answer ends after 12 tokens"):
        fit_to_row(whole, 12, is_text=False)


def test_a_long_text_is_cut_without_losing_a_token():
    pieces = fit_to_row(tokens(150), 64, is_text=True)
    assert [len(piece.input_ids) for piece in pieces] == [64, 64, 22]
    assert sum((piece.input_ids for piece in pieces), []) == tokens(150).input_ids
    assert all(piece.labels[0] == IGNORED for piece in pieces)


def test_a_cut_conversation_keeps_its_system_message_and_ends_with_a_trained_turn(tokenizer):
    chat = [Message("system", "Be brief.")]
    for turn in range(6):
        chat += [Message("user", f"Question {turn}"), Message("assistant", f"Answer {turn}")]
    whole = ChatFormat(tokenizer).encode(Conversation(tuple(chat)))
    (cut,) = fit_to_row(whole, whole.turn_ends[3] + 3, is_text=False)
    assert tokenizer.decode(cut.input_ids).startswith("<s><|system|>Be brief.")
    assert cut.turn_ends == whole.turn_ends[:4]
    # A turn that is not trained is no end: nothing would be learnt from what stands before it.
    untrained = slice(whole.turn_ends[2], whole.turn_ends[3])
    labels = list(whole.labels)
    labels[untrained] = [IGNORED] * len(labels[untrained])
    (cut,) = fit_to_row(replace(whole, labels=labels), whole.turn_ends[3] + 3, is_text=False)
    assert len(cut.input_ids) == whole.turn_ends[2]


def test_examples_that_are_not_chosen_are_not_packed():
    examples = Examples(tokens(10, first=100 * n) for n in range(1, 9))
    chosen = np.array([n % 3 == 0 for n in range(8)])
    packed = pack(examples.table(), 64, chosen)
    assert sorted(ids[0] for ids in split(packed)) == [100, 400, 700]


@pytest.mark.parametrize("group_tokens", [100, 1_000, 1 << 24])
def test_groups_of_any_size_hold_every_example_once(monkeypatch, group_tokens):
    monkeypatch.setattr(packing, "GROUP_TOKENS", group_tokens)
    lengths = [1 + (7 * n) % 60 for n in range(300)]
    packed = pack([tokens(length, first=100 * n) for n, length in enumerate(lengths)], 64)
    assert sorted(ids[0] // 100 for ids in split(packed)) == list(range(300))


def test_one_group_takes_no_more_rows_than_groups_of_a_thousand():
    dice = random.Random(0)
    examples = Examples(tokens(dice.randint(1, 500)) for _ in range(5000))
    total = sum(map(len, (examples[n].input_ids for n in range(5000))))
    rows = len(pack(examples.table(), 512))
    in_thousands = len(pack_dataset(Dataset(examples.table()), 512, strategy="bfd"))
    assert total / 512 <= rows < in_thousands


def split(packed: Dataset) -> list[list[int]]:
    """The token ids of each example in packed rows."""
    found = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            found.append(row["input_ids"][start : start + length])
            start += length
    return found


def pair(chosen: int, rejected: int, first: int = 10) -> Tokens:
    """Two answers of one prompt of two tokens."""
    parts = [tokens(length, first + 1000 * side) for side, length in enumerate((chosen, rejected))]
    ids = [first, first + 1]
    return Tokens(
        [index for part in parts for index in (*ids, *part.input_ids[2:])],
        [label for part in parts for label in (IGNORED, IGNORED, *part.labels[2:])],
        [chosen, chosen + rejected],
        (),
        (chosen, rejected),
        (1, -1),
    )


@pytest.mark.parametrize("group_tokens", [1 << 24, 50])
def test_pairs_are_packed_whole_with_the_chosen_answer_first(monkeypatch, group_tokens):
    monkeypatch.setattr(packing, "GROUP_TOKENS", group_tokens)
    examples = [pair(3 + n % 5, 4 + n % 7, first=20 * n) for n in range(40)]
    packed = pack(examples, 32)
    assert packed.column_names == ["input_ids", "labels", "seq_lengths", "signs"]
    found = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 32
        assert row["signs"] == [1, -1] * (len(row["seq_lengths"]) // 2)
        start = 0
        for chosen, rejected in zip(row["seq_lengths"][::2], row["seq_lengths"][1::2], strict=True):
            end = start + chosen + rejected
            found.append((tuple(row["input_ids"][start:end]), tuple(row["labels"][start:end]), (chosen, rejected)))
            start = end
    assert sorted(found) == sorted((tuple(one.input_ids), tuple(one.labels), one.lengths) for one in examples)


def test_examples_keep_the_lengths_and_signs_of_answers():
    examples = Examples([pair(3, 5), pair(6, 4, first=100)])
    joined = Examples([pair(4, 4, first=300)])
    joined.extend(examples)
    for place, expected in enumerate((pair(4, 4, first=300), pair(3, 5), pair(6, 4, first=100))):
        assert replace(expected, turn_ends=[]) == joined[place]
    first, second = joined[1].conversations()
    assert (len(first.input_ids), len(second.input_ids)) == (3, 5) and first.prompt() == second.prompt() == [10, 11]
