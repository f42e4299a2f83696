"""Greedy generation of completions, for many prompts at a time: how far it is, and an end where time is limited."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from common.machine.processes import is_main_process
from common.machine.slow_work import WorkDone, format_duration, report_slow_work, show_status
from common.model.rope_scaling import usable_positions
from common.model.sharding import is_sharded, shard_empty_layers
from common.run.answer_config import GREEDY, fit_to_answers
from common.run.answer_memory import read_in_parts
from common.run.prompts import Prompt
from common.tokens.stop_ids import stop_ids

PROMPTS_AT_A_TIME = 50
MAX_NEW_TOKENS = 96
# Of prompts and answers that are made together, padding included, but for a single prompt that has more: their keys and
# values take 1.1 GiB for Llama 3 8B.
TOKENS_AT_A_TIME = 9_216


class Completion(str):
    """The text of a completion, and why it has no end of its own."""

    cut: str  # "after 96 tokens", or "after 60 s"; empty for one that ended
    in_time: bool  # False: the time limit cut it, so nobody knows what the model would have said

    def __new__(cls, text: str, cut: str = "", *, in_time: bool = True) -> "Completion":
        made = super().__new__(cls, text)
        made.cut, made.in_time = cut, in_time
        return made


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    at_a_time: int = PROMPTS_AT_A_TIME,
    max_seconds: float | None = None,
    what: str = "answers",
) -> list[Completion]:
    """The model's most likely completions, without the end of turn; one without an end stops at max_new_tokens.

    max_seconds: then the completions under way are cut, and later prompts are left out: the result is of the first
    prompts, and perhaps of none. None takes all the time it needs. Not for sharded layers, whose processes must stop at
    the same token. what: the completions, in the lines that say how far they are.

    The model's mode and attention are restored.
    """
    assert max_seconds is None or not is_sharded(model)
    if not prompts:
        return []
    shard_empty_layers(model)
    ends = stop_ids(tokenizer, model.generation_config.eos_token_id)
    arguments = fit_to_answers(model.generation_config, model.config, tokenizer) | GREEDY
    positions = usable_positions(model.config)
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")  # prompts of several lengths need a mask, common.model.attention
    limit = f"at most {max_new_tokens} tokens each" + ("" if max_seconds is None else f", {max_seconds:g} s together")
    if is_main_process():
        show_status(f"making {len(prompts):,} {what}: {limit}", keep=True)
    completions: list[Completion] = []
    try:
        with report_slow_work(what) as work:
            clock = _Clock(work, len(prompts), at_a_time, max_new_tokens, max_seconds)
            for start, end in _answered_together(prompts, at_a_time, max_new_tokens, positions):
                part = prompts[start:end]
                if len(part[0].input_ids) >= positions:
                    completions.append(_unanswered(part[0], positions))
                    continue
                in_parts = read_in_parts(len(part[0].input_ids)) if len(part) == 1 else {}
                inputs = tokenizer.pad(
                    {"input_ids": [list(prompt.input_ids) for prompt in part]}, padding_side="left", return_tensors="pt"
                ).to(model.device)
                try:
                    with clock.watched(model, start, len(part)):
                        outputs = model.generate(
                            **inputs,
                            max_length=inputs["input_ids"].shape[1] + max_new_tokens,
                            **arguments | in_parts,
                            stopping_criteria=StoppingCriteriaList([clock]),
                            tokenizer=tokenizer,  # which stop_strings need
                            use_cache=True,
                            pad_token_id=tokenizer.pad_token_id,
                            eos_token_id=ends,
                        )
                except _TimeIsUp:
                    break
                completions += _completions(outputs[:, inputs["input_ids"].shape[1] :], tokenizer, ends, clock)
                if clock.is_up():
                    break
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)
    return completions


def _answered_together(
    prompts: Sequence[Prompt], at_a_time: int, max_new_tokens: int, positions: int
) -> Iterator[tuple[int, int]]:
    """Which prompts are answered together, as start and end: in their order, and of long ones fewer."""
    start, longest = 0, 0
    for index, prompt in enumerate(prompts):
        tokens = len(prompt.input_ids)
        longest = max(longest, tokens + max_new_tokens)
        count = index + 1 - start
        is_alone = tokens >= positions or (index and len(prompts[index - 1].input_ids) >= positions)
        if index > start and (count > at_a_time or count * longest > TOKENS_AT_A_TIME or is_alone):
            yield start, index
            start, longest = index, tokens + max_new_tokens
    if prompts:
        yield start, len(prompts)


def _unanswered(prompt: Prompt, positions: int) -> Completion:
    tokens = len(prompt.input_ids)
    return Completion(
        "", f"before its first token: the prompt has {tokens:,} tokens, the model {positions:,} positions"
    )


def cut_of(text: str) -> str:
    """Why a completion has no end; empty for one that ended, and for any other text."""
    return text.cut if isinstance(text, Completion) else ""


def shown(text: str, cut: str) -> str:
    """A completion as it is shown: a cut one says so. cut: as cut_of."""
    return f"{text} … (cut {cut})" if cut else text


def _completions(
    new: Tensor, tokenizer: PreTrainedTokenizerFast, ends: Sequence[int], clock: "_Clock"
) -> Iterator[Completion]:
    """The texts of a batch. new: generated ids, int64 (prompts, tokens), with padding behind a completion's end."""
    last = torch.tensor([*ends, tokenizer.pad_token_id], device=new.device)
    has_ended = torch.isin(new, last).any(dim=1).tolist()
    for text, ended in zip(tokenizer.batch_decode(new, skip_special_tokens=True), has_ended, strict=True):
        if ended:
            yield Completion(text)
        elif new.shape[1] == clock.max_new_tokens:
            yield Completion(text, f"after {clock.max_new_tokens} tokens")
        elif clock.stopped:
            yield Completion(text, f"after {clock.max_seconds:g} s", in_time=False)
        else:  # a stop string ended it with the batch's last token
            yield Completion(text)


class _TimeIsUp(Exception):
    """Time ended before the first token of a batch."""


class _Clock(StoppingCriteria):
    """Tells how far generation is, token by token, and ends it when its time is over."""

    def __init__(
        self, work: WorkDone, prompts: int, at_a_time: int, max_new_tokens: int, max_seconds: float | None
    ) -> None:
        self.work, self.prompts, self.at_a_time = work, prompts, at_a_time
        self.max_new_tokens, self.max_seconds = max_new_tokens, max_seconds
        self.started_at = time.perf_counter()
        self.start = self.count = self.tokens = 0  # of the batch under way
        self.read = self.written = 0  # prompts read, and tokens after the first one of each batch
        self.reading = self.writing = 0.0  # seconds for them
        self.last = self.started_at
        self.stopped = False

    def is_up(self) -> bool:
        return self.max_seconds is not None and time.perf_counter() - self.started_at > self.max_seconds

    @contextmanager
    def watched(self, model: nn.Module, start: int, count: int) -> Iterator[None]:
        """While a batch is generated: of `count` prompts, from number `start` on.

        The first token needs the whole prompt, which may take minutes by itself: time is looked at before each layer.
        """
        self.start, self.count, self.tokens, self.last = start, count, 0, time.perf_counter()
        self._tell()

        def check(*_: object) -> None:
            if not self.tokens and self.is_up():
                raise _TimeIsUp

        layers = model.get_decoder().layers if self.max_seconds is not None else []  # type: ignore[operator]
        hooks = [layer.register_forward_pre_hook(check) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """After each token of a batch. Returns bool (prompts,): whether each is done."""
        now = time.perf_counter()
        if self.tokens:
            self.writing, self.written = self.writing + now - self.last, self.written + 1
        else:
            self.reading, self.read = self.reading + now - self.last, self.read + self.count
        self.last, self.tokens = now, self.tokens + 1
        self._tell()
        self.stopped = self.is_up()
        return torch.full((input_ids.shape[0],), self.stopped, dtype=torch.bool, device=input_ids.device)

    def _tell(self) -> None:
        """Says how far it is, and for how long it goes on if no answer ends before its limit."""
        note = f"{self.start:,} of {self.prompts:,} done, "
        if self.tokens:
            note += f"the next {self.count} at token {self.tokens} of at most {self.max_new_tokens}"
        else:
            note += f"reading the next {self.count} prompts"
        if self.written:
            later = self.prompts - self.start - self.count
            batches = -(-later // self.at_a_time)
            steps = self.max_new_tokens - self.tokens + batches * self.max_new_tokens
            left = steps * self.writing / self.written + later * self.reading / self.read
            if self.max_seconds is not None:
                left = min(left, max(self.started_at + self.max_seconds - self.last, 0))
            note += f", at most about {format_duration(left)} left"
        self.work.note = note
