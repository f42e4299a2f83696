"""Answers that stand behind the prompt of another example: what KTO compares with (arXiv:2402.01306, section 4.1)."""

from collections.abc import Callable, Sequence
from typing import Any

from common.data.batches import Batch
from common.tokens.labels import IGNORED

MISMATCHED = "mismatched"  # the entry of collate_with_mismatched


def mismatch_answers(row: dict[str, Any]) -> dict[str, Any] | None:
    """A packed row in which each example has the answer of the next one, and the last one that of the first.

    It has as many tokens as before. An answer is what stands from the first trained token on. Its signs are all 1, and
    its reference is the row's kl_reference, where it has that. None for a row of a single example.
    """
    if len(row["seq_lengths"]) < 2:
        return None
    prompts, answers, start = list[list[int]](), list[tuple[list[int], list[int]]](), 0
    for length in row["seq_lengths"]:
        ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
        begin = next((place for place, label in enumerate(labels) if label != IGNORED), length)
        prompts.append(ids[:begin])
        answers.append((ids[begin:], labels[begin:]))
        start += length
    made: dict[str, Any] = {"input_ids": [], "labels": [], "seq_lengths": [], "signs": [1.0] * len(prompts)}
    for prompt, (ids, labels) in zip(prompts, answers[1:] + answers[:1], strict=True):
        made["input_ids"] += prompt + ids
        made["labels"] += [IGNORED] * len(prompt) + labels
        made["seq_lengths"].append(len(prompt) + len(ids))
    if "kl_reference" in row:
        made["reference"] = row["kl_reference"]
    return made


def collate_with_mismatched(rows: Sequence[dict[str, Any]], collate_rows: Callable[..., Batch]) -> Batch:
    """What collate_rows makes of the rows, with a micro-batch of their mismatched ones, if there are any, as an entry.

    Who takes the batch takes that entry out before the model sees it.
    """
    batch = collate_rows(rows)
    mismatched = [made for row in rows if (made := mismatch_answers(row)) is not None]
    return batch | ({MISMATCHED: collate_rows(mismatched)} if mismatched else {})
