"""How the saved chat template asks for an answer: with thoughts or without, as the answers were trained."""

from collections.abc import Sequence
from copy import copy

from transformers import PreTrainedTokenizerFast

from common.data.report import DataReport
from common.tokens.template_samples import SWITCHED_THINKING


def ask_as_trained(tokenizer: PreTrainedTokenizerFast, reports: Sequence[DataReport]) -> PreTrainedTokenizerFast:
    """Returns the tokenizer to save with a run: its template's default for enable_thinking is that of the rows.

    It is the same tokenizer, unless every row was trained behind the prompt that the other value gives. Prints that.
    """
    for value in (True, False):
        note = SWITCHED_THINKING.format(value)
        if any(report.kept for report in reports) and all(report.notes[note] == report.kept for report in reports):
            tokenizer = copy(tokenizer)
            default = f"{{%- set enable_thinking = enable_thinking | default({str(value).lower()}) -%}}"
            tokenizer.chat_template = f"{default}\n{tokenizer.chat_template}"
            print(f"the saved chat template asks with enable_thinking={value}, as all rows were trained")
            break
    return tokenizer
