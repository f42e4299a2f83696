"""Base and adapter on better and worse answers: what make eval measures of a run with preferences."""

from functools import partial

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from common.data.batches import collate
from common.data.mismatched import collate_with_mismatched
from common.model.attention import uses_packed_attention
from common.recipe import PreferenceSpec
from common.run.preference_evaluation import held_out_metrics
from common.run.preference_metrics import HELD_OUT
from common.run.reference import with_reference_columns


def compare_preferences(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset, spec: PreferenceSpec
) -> dict[str, dict[str, float]]:
    """Of "base" and "adapter": the loss of a comparison, rewards, how many come out right.

    rows: with the reference of the run that held them out. Rows of another source have none, and are compared with the
    base.
    """
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id, padding_free=uses_packed_attention(model))
    if spec.kind == "rated":
        collate_rows = partial(collate_with_mismatched, collate_rows=collate_rows)
    if spec.needs_reference and "reference" not in rows.column_names:
        with model.disable_adapter():
            rows = with_reference_columns(model, tokenizer, rows, spec)
    found = {"adapter": held_out_metrics(model, rows, collate_rows, spec)}
    with model.disable_adapter():
        found["base"] = held_out_metrics(model, rows, collate_rows, spec)
    return {
        who: {"loss": metrics.pop("eval_loss")}
        | {name.removeprefix(HELD_OUT): value for name, value in metrics.items()}
        for who, metrics in found.items()
    }
