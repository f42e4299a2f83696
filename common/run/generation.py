"""Greedy generation of completions, for many prompts at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from common.machine.slow_work import report_slow_work
from common.run.answer_config import GREEDY, fit_to_answers
from common.run.prompts import Prompt
from common.tokens.stop_ids import stop_ids

PROMPTS_AT_A_TIME = 50
MAX_NEW_TOKENS = 96


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    at_a_time: int = PROMPTS_AT_A_TIME,
) -> list[str]:
    """The model's most likely completions, without the end of turn; one without an end stops at max_new_tokens.

    The model's mode and attention are restored.
    """
    ends = stop_ids(tokenizer, model.generation_config.eos_token_id)
    arguments = fit_to_answers(model.generation_config, model.config, tokenizer) | GREEDY
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")  # prompts of several lengths need a mask, common.model.attention
    completions: list[str] = []
    try:
        with report_slow_work("generating completions", len(prompts), "prompts") as work:
            for start in range(0, len(prompts), at_a_time):
                part = prompts[start : start + at_a_time]
                inputs = tokenizer.pad(
                    {"input_ids": [list(prompt.input_ids) for prompt in part]}, padding_side="left", return_tensors="pt"
                ).to(model.device)
                outputs = model.generate(
                    **inputs,
                    max_length=inputs["input_ids"].shape[1] + max_new_tokens,
                    **arguments,
                    tokenizer=tokenizer,  # which stop_strings need
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=ends,
                )
                new = outputs[:, inputs["input_ids"].shape[1] :]
                completions += tokenizer.batch_decode(new, skip_special_tokens=True)
                work.done += len(part)
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)
    return completions
