"""Answers to held-out prompts, before training and after it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.conversations import Conversation
from common.data import DataReport, read_examples
from common.recipe import UserError


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to its last answer, and that answer."""

    prompt: Conversation
    expected: str


def load_questions(source: str | None, limit: int | None = None) -> list[Question]:
    """The last turn of each conversation in a file; none without a file. Raises UserError when the file holds none."""
    if source is None:
        return []
    examples = [example for _, example in read_examples(source, DataReport(source))]
    conversations = [example for example in examples if not isinstance(example, str)][:limit]
    if not conversations:
        raise UserError(f"{source} holds no conversations to ask")
    return [Question(turns[:-1], turns[-1].content) for turns in conversations]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 96,
    batch: int = 50,
) -> list[str]:
    """The model's greedy answers, without the end of turn; an answer that does not end is cut at max_new_tokens."""
    was_training = model.training
    model.eval()
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # prompts of several lengths need a mask, common.attention
    answers: list[str] = []
    for start in range(0, len(questions), batch):
        prompts = [
            tokenizer.apply_chat_template(
                [asdict(message) for message in question.prompt],
                tokenize=False,
                add_generation_prompt=True,
            )
            for question in questions[start : start + batch]
        ]
        inputs = tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        outputs = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.set_attn_implementation(attention)
    model.train(was_training)
    return answers


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
