"""Greedy answers to prompts, many at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

BATCH = 50  # prompts at a time
# For transformers' generate; what a model's own generation config says of sampling is left out, or it would warn.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 96,
    batch: int = BATCH,
) -> list[str]:
    """The model's most likely answers, without the end of turn; one that does not end is cut at max_new_tokens.

    prompts: token ids, of any lengths. The model is left as it was.
    """
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")  # prompts of several lengths need a mask, common.model.attention
    answers: list[str] = []
    try:
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            inputs = tokenizer.pad(
                {"input_ids": [list(prompt) for prompt in part]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            outputs = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                **GREEDY,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)
    return answers
