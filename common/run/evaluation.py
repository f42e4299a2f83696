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
from common.data.rows import count_trained_tokens
from common.machine.disk import write_named_file
from common.model.activation_checkpointing import long_rows_in_tiles
from common.model.attention import uses_packed_attention
from common.recipe import PreferenceSpec
from common.run.drift import Drift, measure_drift
from common.run.general_texts import GeneralTexts
from common.run.generation import Completion, cut_of, generate, shown
from common.run.held_out_loss import batch_nll, mean_nll, perplexity
from common.run.preference_comparison import compare_preferences
from common.run.preference_metrics import ACCURACY, MARGIN
from common.run.prompts import Prompt

MAX_SAMPLE_TOKENS = 128  # of a completion that is shown
SAMPLES_AT_A_TIME = 8  # their keys and values take 1.2 GiB for Llama 3 8B
SAMPLE_SECONDS = 60.0  # for all samples of the base, and for all with the adapter: a slow device shows less


def exact_matches(prompts: Sequence[Prompt], completions: Sequence[str]) -> int:
    """How many completions are the reference, to the letter."""
    return sum(given == prompt.reference for prompt, given in zip(prompts, completions, strict=True))


def print_before_after(prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str], show: int = 3) -> None:
    """Prints the first prompts with both completions, then the share of exact matches. Nothing without prompts.

    The share is of all prompts: where a time limit cut an answer, or left one out, it is not measured.
    """
    if not prompts:
        return
    answers = list(zip(prompts, before, after, strict=False))
    for prompt, old, new in answers[:show]:
        print(f"\n  asked   {prompt.text}\n  before  {shown(old, cut_of(old))}\n  after   {shown(new, cut_of(new))}")
        if new != prompt.reference:
            print(f"  wanted  {prompt.reference}")
    count = len(prompts)
    whole = sum(_has_time(old) and _has_time(new) for _, old, new in answers)
    if whole < count:
        print(
            f"\nheld-out exact match: not measured, because time allowed whole answers to {whole} of {count} prompts "
            "only, and short answers are the easier ones"
        )
        return
    right_before, right_after = exact_matches(prompts, before), exact_matches(prompts, after)
    print(
        f"\nheld-out exact match: {right_before / count:.0%} before, {right_after / count:.0%} after ({count} prompts)"
    )
    endless = [sum(bool(cut_of(text)) for text in texts) for texts in (before, after)]
    if any(endless):
        print(f"counted as wrong, because they had no end within their tokens: {endless[0]} before, {endless[1]} after")


def _has_time(text: str) -> bool:
    return not isinstance(text, Completion) or text.in_time


def compare_completions(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    max_seconds: float = SAMPLE_SECONDS,
) -> list[dict[str, str]]:
    """For each prompt its text, the reference, and the completions without (before) and with the adapter (after).

    Those that were cut say where: before_cut, after_cut. max_seconds: for the completions of each side. Where it is too
    short for all, the first prompts are compared, and a line says so.
    """
    limits: dict[str, Any] = {
        "max_new_tokens": MAX_SAMPLE_TOKENS,
        "at_a_time": SAMPLES_AT_A_TIME,
        "max_seconds": max_seconds,
    }
    with model.disable_adapter():
        before = generate(model, tokenizer, prompts, **limits, what="sample answers without the adapter")
    # where time was short for the base, only what it answered can be compared
    after = generate(model, tokenizer, prompts[: len(before)], **limits, what="sample answers with the adapter")
    if len(after) < len(prompts):
        print(
            f"{len(after)} of {len(prompts)} sample answers: {max_seconds:g} s were too short for the others; "
            'more time: make eval ARGS="--answer-seconds 600"'
        )
    return [_sample(prompt, old, new) for prompt, old, new in zip(prompts, before, after, strict=False)]


def _sample(prompt: Prompt, before: Completion, after: Completion) -> dict[str, str]:
    answers = {"before": before, "after": after}
    cut = {f"{name}_cut": answer.cut for name, answer in answers.items() if answer.cut}
    return {"asked": prompt.text, "wanted": prompt.reference, "before": before, "after": after, **cut}


def compare_with_base(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    prompts: Sequence[Prompt],
    general: GeneralTexts | None = None,
    max_seconds: float = SAMPLE_SECONDS,
    preference: PreferenceSpec | None = None,
) -> dict[str, Any]:
    """Held-out loss, perplexity and completions, of the base and with the adapter, in one load of the weights.

    general: texts on which drift is measured too. max_seconds: as compare_completions. preference: of the run, whose
    loss is then measured, with rewards instead of perplexity.
    """
    with long_rows_in_tiles(model, max(map(sum, rows["seq_lengths"]), default=0)):
        if preference is None:
            losses, tokens = _compare_losses(model, tokenizer, rows)
        else:
            losses, tokens = compare_preferences(model, tokenizer, rows, preference), count_trained_tokens(rows)
    drift = None if general is None else measure_drift(model, general, tokenizer)
    return {
        "trained_tokens": tokens,
        **losses,
        "drift": None if drift is None else asdict(drift),
        "samples": compare_completions(model, tokenizer, prompts, max_seconds),
    }


def _compare_losses(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset
) -> tuple[dict[str, dict[str, float]], int]:
    """Loss and perplexity of "base" and "adapter", and the number of trained tokens."""
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id, padding_free=uses_packed_attention(model))

    def nll(batch: dict[str, Any]) -> float:
        return batch_nll(model, batch).item()

    with_adapter, tokens = mean_nll(rows, nll, collate_rows)
    with model.disable_adapter():
        of_base, _ = mean_nll(rows, nll, collate_rows)
    losses = {"base": of_base, "adapter": with_adapter}
    return {who: {"loss": loss, "perplexity": perplexity(loss)} for who, loss in losses.items()}, tokens


def print_evaluation(result: dict[str, Any]) -> None:
    """Prints the losses and the completions side by side. result: of compare_with_base, and the rows' "source"."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    print(f"\n{result['source']}, {result['trained_tokens']:,} trained tokens:")
    is_nll = "perplexity" in result["base"]
    losses = Table("", "loss, nats a token", "perplexity") if is_nll else Table("", "loss", "accuracy", "margin")
    for name, title in (("base", "base"), ("adapter", "with the adapter")):
        found = result[name]
        more = (
            [f"{found['perplexity']:,.2f}"]
            if is_nll
            else [f"{found[ACCURACY]:.1%}", f"{found[MARGIN]:.4f}" if MARGIN in found else "-"]
        )
        losses.add_row(title, f"{found['loss']:.4f}", *more)
    console.print(losses)
    if result["drift"] is not None:
        print("\n".join(Drift(**result["drift"]).lines()))
    if not result["samples"]:
        return
    completions = Table(show_lines=True)
    for title in ("asked", "base", "with the adapter", "in the data"):
        completions.add_column(title, overflow="fold", ratio=1)
    for sample in result["samples"]:
        before, after = (shown(sample[side], sample.get(f"{side}_cut", "")) for side in ("before", "after"))
        completions.add_row(*map(Text, (sample["asked"], before, after, sample["wanted"])))
    console.print(completions)


def write_evaluation(result: dict[str, Any], path: Path) -> None:
    """Writes eval.json. Raises UserError when it cannot be written."""
    write_named_file(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
