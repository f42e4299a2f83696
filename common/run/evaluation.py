"""What training changed: held-out loss and completions of held-out prompts, before and after, of base and adapter."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from common.data.batches import collate
from common.machine.disk import write_named_file
from common.model.attention import uses_packed_attention
from common.run.drift import Drift, measure_drift
from common.run.general_texts import GeneralTexts
from common.run.generation import generate
from common.run.held_out_loss import batch_nll, mean_nll, perplexity
from common.run.prompts import Prompt

MAX_SAMPLE_TOKENS = 128  # of a completion that is shown
SAMPLES_AT_A_TIME = 8  # their keys and values take 1.2 GiB for Llama 3 8B


def exact_matches(prompts: Sequence[Prompt], completions: Sequence[str]) -> int:
    """How many completions are the reference, to the letter."""
    return sum(given == prompt.reference for prompt, given in zip(prompts, completions, strict=True))


def print_before_after(prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str], show: int = 3) -> None:
    """Prints the first prompts with both completions, then the share of exact matches. Nothing without prompts."""
    if not prompts:
        return
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:show]:
        print(f"\n  asked   {prompt.text}\n  before  {old}\n  after   {new}")
        if new != prompt.reference:
            print(f"  wanted  {prompt.reference}")
    count = len(prompts)
    right_before, right_after = exact_matches(prompts, before), exact_matches(prompts, after)
    print(
        f"\nheld-out exact match: {right_before / count:.0%} before, {right_after / count:.0%} after ({count} prompts)"
    )


def compare_completions(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]
) -> list[dict[str, str]]:
    """For each prompt its text, the reference, and the completions without (before) and with the adapter (after)."""
    limits = {"max_new_tokens": MAX_SAMPLE_TOKENS, "at_a_time": SAMPLES_AT_A_TIME}
    with model.disable_adapter():
        before = generate(model, tokenizer, prompts, **limits)
    after = generate(model, tokenizer, prompts, **limits)
    return [
        {"asked": prompt.text, "wanted": prompt.reference, "before": old, "after": new}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]


def compare_with_base(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    prompts: Sequence[Prompt],
    general: GeneralTexts | None = None,
) -> dict[str, Any]:
    """Held-out loss, perplexity and completions, of the base and with the adapter, in one load of the weights.

    general: texts on which drift is measured too.
    """
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id, padding_free=uses_packed_attention(model))

    def nll(batch: dict[str, Any]) -> float:
        return batch_nll(model, batch).item()

    with_adapter, tokens = mean_nll(rows, nll, collate_rows)
    with model.disable_adapter():
        of_base, _ = mean_nll(rows, nll, collate_rows)
    drift = None if general is None else measure_drift(model, general, tokenizer)
    return {
        "trained_tokens": tokens,
        "base": {"loss": of_base, "perplexity": perplexity(of_base)},
        "adapter": {"loss": with_adapter, "perplexity": perplexity(with_adapter)},
        "drift": None if drift is None else asdict(drift),
        "samples": compare_completions(model, tokenizer, prompts),
    }


def print_evaluation(result: dict[str, Any]) -> None:
    """Prints the losses and the completions side by side. result: of compare_with_base, and the rows' "source"."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    print(f"\n{result['source']}, {result['trained_tokens']:,} trained tokens:")
    losses = Table("", "loss, nats a token", "perplexity")
    for name, title in (("base", "base"), ("adapter", "with the adapter")):
        losses.add_row(title, f"{result[name]['loss']:.4f}", f"{result[name]['perplexity']:,.2f}")
    console.print(losses)
    if result["drift"] is not None:
        print("\n".join(Drift(**result["drift"]).lines()))
    if not result["samples"]:
        return
    completions = Table(show_lines=True)
    for title in ("asked", "base", "with the adapter", "in the data"):
        completions.add_column(title, overflow="fold", ratio=1)
    for sample in result["samples"]:
        completions.add_row(*(Text(sample[name]) for name in ("asked", "before", "after", "wanted")))
    console.print(completions)


def write_evaluation(result: dict[str, Any], path: Path) -> None:
    """Writes eval.json. Raises UserError when it cannot be written."""
    write_named_file(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
