"""Held-out prompts: conversations or texts that a model is asked to go on with, and what the data answers."""

from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from common.conversations.conversation import Preference
from common.conversations.pairs import untrained
from common.data.report import DataReport
from common.data.tokenise import read_examples
from common.machine.processes import is_main_process
from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat
from common.tokens.labels import IGNORED

if TYPE_CHECKING:
    import pyarrow

MAX_PROMPT_TOKENS = 1024  # a longer prompt is not sampled


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, its last message as it is shown, and the completion that the data has: the reference."""

    input_ids: list[int]
    text: str
    reference: str


def load_prompts(source: str | None, tokenizer: PreTrainedTokenizerFast, limit: int | None = None) -> list[Prompt]:
    """Each conversation in a file or hub data set as a prompt, its last answer the reference; none without a source.

    Of better and worse answers, the better one is the reference, and a prompt that has several is there once; where all
    its rated answers are bad, it is left out. Prompt and reference are those that a run trains, with the answer's
    thoughts where the template writes them. Raises UserError when the source holds no conversations.
    """
    if source is None:
        return []
    chat_format, prompts, asked_before = ChatFormat(tokenizer), list[Prompt](), set[tuple[int, ...]]()
    for _, example in read_examples(source, DataReport(source)):
        if len(prompts) == limit:
            break
        is_preference = isinstance(example, Preference)
        if isinstance(example, Preference):
            if example.signs[0] < 0:
                continue
            example = example.conversations[0]
        if isinstance(example, str):
            continue
        turns = example.messages
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.is_trained and turn.content]
        if not answers or not answers[-1]:  # no question stands before it
            continue
        asked = turns[: answers[-1]]
        with suppress(BadRow):  # load_rows has counted and named it
            tokens = chat_format.encode(replace(example, messages=(*untrained(asked), turns[answers[-1]])))
            start = next(i for i, label in enumerate(tokens.labels) if label != IGNORED)
            reference = tokenizer.decode(tokens.input_ids[start : tokens.turn_ends[0]], skip_special_tokens=True)
            if is_preference and tuple(tokens.input_ids[:start]) in asked_before:
                continue
            asked_before.add(tuple(tokens.input_ids[:start]))
            prompts.append(Prompt(tokens.input_ids[:start], asked[-1].content, reference))
    if not prompts:
        raise UserError(f"{source} holds no conversations to ask")
    return prompts


def sample_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> list[Prompt]:
    """`count` examples of packed rows, drawn by `seed`. The last trained span is the reference, all before the prompt.

    A plain text is trained whole: its first quarter is the prompt. Prompts beyond MAX_PROMPT_TOKENS are left out, and
    where fewer are left than are wanted a line says so. Of better and worse answers, the chosen or good ones are drawn,
    and of those to the same prompt one.
    """
    chat_format, prompts, too_long = ChatFormat(tokenizer), list[Prompt](), 0
    table = rows.with_format("arrow")  # whose parts are read without the whole row, which may have a million tokens
    has_signs = "signs" in rows.column_names
    places = [(row, n) for row, lengths in enumerate(rows["seq_lengths"]) for n in range(len(lengths))]
    if has_signs:
        signs = rows["signs"]
        places = [(row, n) for row, n in places if signs[row][n] > 0]
    for row, number in Random(seed).sample(places, len(places)):
        if len(prompts) == count:
            break
        ids, labels = _example(table[row], number)
        span = _last_completion(labels)
        if span is None:
            continue
        if span[0] > MAX_PROMPT_TOKENS:
            too_long += 1
            continue
        start, end = span
        if has_signs and any(ids[:start] == prompt.input_ids for prompt in prompts):
            continue
        reference = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        prompts.append(Prompt(ids[:start], chat_format.last_message(ids[:start]), reference))
    if too_long and len(prompts) < count and is_main_process():
        print(
            f"sample answers: to {len(prompts)} held-out prompts of {count} that are wanted; {too_long:,} are longer "
            f"than {MAX_PROMPT_TOKENS:,} tokens, and none of those is asked"
        )
    return prompts


def _example(packed: "pyarrow.Table", number: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one example of a packed row."""
    lengths = packed["seq_lengths"].combine_chunks().flatten().to_numpy()
    start, length = int(lengths[:number].sum()), int(lengths[number])
    ids, labels = (
        packed[name].combine_chunks().flatten().slice(start, length).to_pylist() for name in ("input_ids", "labels")
    )
    return ids, labels


def _last_completion(labels: list[int]) -> tuple[int, int] | None:
    """Start and end of the last span of trained tokens; None where nothing is left for a prompt or a completion."""
    trained = [i for i, label in enumerate(labels) if label != IGNORED]
    if not trained:
        return None
    start = next(i for i in reversed(trained) if i == 0 or labels[i - 1] == IGNORED)
    if start <= 1:  # everything is trained
        start = max(2, len(labels) // 4)
    if start >= len(labels):
        return None
    return start, next((i for i in range(start, len(labels)) if labels[i] == IGNORED), len(labels))
