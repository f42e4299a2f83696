"""What training changed: held-out loss and answers, before and after, of the base and of the adapter on it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.data.batches import collate
from common.data.chat_format import ChatFormat
from common.data.conversations import Conversation
from common.data.labels import IGNORED
from common.data.report import DataReport
from common.data.rows import read_examples
from common.machine.device import this_machine
from common.model.attention import uses_packed_attention
from common.recipe import UserError
from common.run.answers import BATCH, generate_answers

MOST_PROMPT_TOKENS = 1024  # of a sample; a longer prompt is not shown
SAMPLE_TOKENS = 128  # of an answer
SAMPLE_BATCH = 8  # at a time: their keys and values are 1.2 GiB for Llama 3 8B


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to its last answer, and that answer."""

    prompt: Conversation
    expected: str


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, and what the data answers."""

    prompt_ids: list[int]
    asked: str
    wanted: str


def load_questions(source: str | None, limit: int | None = None) -> list[Question]:
    """The last turn of each conversation in a file; none without a file. Raises UserError when the file holds none."""
    if source is None:
        return []
    examples = [example for _, example in read_examples(source, DataReport(source))]
    conversations = [example for example in examples if not isinstance(example, str)][:limit]
    if not conversations:
        raise UserError(f"{source} holds no conversations to ask")
    return [Question(turns[:-1], turns[-1].content) for turns in conversations]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 96,
    batch: int = BATCH,
) -> list[str]:
    """The model's greedy answers, as generate_answers gives them."""
    chat_format = ChatFormat(tokenizer)
    prompts = [chat_format.prompt_ids(question.prompt) for question in questions]
    return generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch=batch)


def exact_matches(questions: Sequence[Question], answers: Sequence[str]) -> int:
    return sum(given == question.expected for question, given in zip(questions, answers, strict=True))


def print_before_after(
    questions: Sequence[Question], before: Sequence[str], after: Sequence[str], show: int = 3
) -> None:
    """A few questions with both answers, then how many answers are right to the letter. Nothing without questions."""
    if not questions:
        return
    for question, old, new in list(zip(questions, before, after, strict=True))[:show]:
        print(f"\n  asked   {question.prompt[-1].content}\n  before  {old}\n  after   {new}")
        if new != question.expected:
            print(f"  wanted  {question.expected}")
    count = len(questions)
    right_before, right_after = exact_matches(questions, before), exact_matches(questions, after)
    print(
        f"\nheld-out exact match: {right_before / count:.0%} before, {right_after / count:.0%} after ({count} prompts)"
    )


def held_out_samples(rows: Dataset, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> list[Sample]:
    """`count` examples of packed rows, drawn by `seed`: each one's last answer, and all before it as the prompt.

    Of a plain text the first quarter is the prompt.
    """
    chat_format, samples = ChatFormat(tokenizer), list[Sample]()
    places = [(row, n) for row, lengths in enumerate(rows["seq_lengths"]) for n in range(len(lengths))]
    for row, number in Random(seed).sample(places, len(places)):
        if len(samples) == count:
            break
        packed = rows[row]
        lengths = packed["seq_lengths"]
        span = slice(sum(lengths[:number]), sum(lengths[: number + 1]))
        ids, labels = packed["input_ids"][span], packed["labels"][span]
        trained = [i for i, label in enumerate(labels) if label != IGNORED]
        if not trained:
            continue
        start = next(i for i in reversed(trained) if i == 0 or labels[i - 1] == IGNORED)
        if start <= 1:  # all is trained
            start = max(2, len(ids) // 4)
        if not 0 < start <= MOST_PROMPT_TOKENS or start >= len(ids):
            continue
        end = next((i for i in range(start, len(ids)) if labels[i] == IGNORED), len(ids))
        wanted = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        samples.append(Sample(ids[:start], chat_format.last_message(ids[:start]), wanted))
    return samples


def sample_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]
) -> list[dict[str, str]]:
    """For each sample what was asked, what the data wants, and the answers without (before) and with the adapter."""
    if not samples:
        return []
    prompts = [sample.prompt_ids for sample in samples]
    with model.disable_adapter():
        before = generate_answers(model, tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, batch=SAMPLE_BATCH)
    after = generate_answers(model, tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, batch=SAMPLE_BATCH)
    return [
        {"asked": sample.asked, "wanted": sample.wanted, "before": old, "after": new}
        for sample, old, new in zip(samples, before, after, strict=True)
    ]


@torch.no_grad()
def mean_loss(model: PeftModel, rows: Dataset, pad_token_id: int) -> tuple[float, int]:
    """Negative log-likelihood in nats, mean over the trained tokens of all packed rows, and how many they are."""
    total, count, machine = 0.0, 0, this_machine()
    for row in rows:
        batch = collate([row], pad_token_id, padding_free=uses_packed_attention(model))
        batch = {name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        with torch.autocast(machine.device.type, machine.dtype, enabled=machine.is_gpu):  # as in the run
            total += model(**batch, num_items_in_batch=1).loss.item()
        count += len(batch["trained_positions"])
    return total / max(count, 1), count


def evaluate(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset, samples: Sequence[Sample]
) -> dict[str, Any]:
    """Base and adapter on the same held-out rows, in one load of the weights: loss, perplexity, answers."""
    after, tokens = mean_loss(model, rows, tokenizer.pad_token_id)
    with model.disable_adapter():
        before, _ = mean_loss(model, rows, tokenizer.pad_token_id)
    return {
        "trained_tokens": tokens,
        "base": {"loss": before, "perplexity": math.exp(min(before, 700.0))},
        "adapter": {"loss": after, "perplexity": math.exp(min(after, 700.0))},
        "samples": sample_answers(model, tokenizer, samples),
    }


def print_evaluation(result: dict[str, Any]) -> None:
    """The losses and the answers, side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    print(f"\n{result['source']}, {result['trained_tokens']:,} trained tokens:")
    losses = Table("", "loss, nats a token", "perplexity")
    for name, title in (("base", "base"), ("adapter", "with the adapter")):
        losses.add_row(title, f"{result[name]['loss']:.4f}", f"{result[name]['perplexity']:,.2f}")
    console.print(losses)
    if not result["samples"]:
        return
    answers = Table(show_lines=True)
    for title in ("asked", "base", "with the adapter", "in the data"):
        answers.add_column(title, overflow="fold", ratio=1)
    for sample in result["samples"]:
        answers.add_row(*(Text(sample[name]) for name in ("asked", "before", "after", "wanted")))
    console.print(answers)


def write_evaluation(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
