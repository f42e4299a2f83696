"""Answers behind the prompts of other examples."""

from functools import partial

from common.data.batches import REFERENCE, SIGNS, collate
from common.data.mismatched import MISMATCHED, collate_with_mismatched, mismatch_answers

ROW = {
    "input_ids": [1, 2, 3, 10, 11, 20, 21],
    "labels": [-100, 2, 3, -100, 11, -100, 21],
    "seq_lengths": [3, 2, 2],
    "signs": [1.0, -1.0, 1.0],
}


def test_each_example_gets_the_answer_of_the_next_one():
    assert mismatch_answers(ROW | {"reference": [9.0] * 3, "kl_reference": [-1.0, -2.0, -3.0]}) == {
        "input_ids": [1, 11, 10, 21, 20, 2, 3],
        "labels": [-100, 11, -100, 21, -100, 2, 3],
        "seq_lengths": [2, 2, 3],
        "signs": [1.0] * 3,
        "reference": [-1.0, -2.0, -3.0],
    }


def test_a_row_of_one_example_has_no_other_answer():
    assert mismatch_answers({"input_ids": [1, 2], "labels": [-100, 2], "seq_lengths": [2], "signs": [1.0]}) is None


def test_they_come_as_an_entry_of_the_micro_batch_where_there_are_any():
    collate_rows = partial(collate, pad_token_id=0)
    alone = {"input_ids": [1, 2], "labels": [-100, 2], "seq_lengths": [2], "signs": [-1.0]}
    assert MISMATCHED not in collate_with_mismatched([alone], collate_rows)
    rows = [
        row | {"reference": [0.0] * len(row["signs"]), "kl_reference": kl}
        for row, kl in ((alone, []), (ROW, [-1.0, -2.0, -3.0]))
    ]
    batch = collate_with_mismatched(rows, collate_rows)
    assert batch[SIGNS].tolist() == [-1.0, 1.0, -1.0, 1.0]
    assert batch[MISMATCHED][REFERENCE].tolist() == [-1.0, -2.0, -3.0]
    assert batch[MISMATCHED]["input_ids"].tolist() == [[1, 11, 10, 21, 20, 2, 3]]
