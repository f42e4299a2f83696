"""What a run would make of its data, also where it would refuse it."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from common.data.report import DataReport, UnusableRows
from common.data.rows import Rows, load_rows
from common.data.sample import DrawnExample, draw_examples
from common.recipe import DataSpec, UserError
from common.tokens.chat_format import ChatFormat


class Look(NamedTuple):
    """What could be found out."""

    rows: Rows | None  # None where the run would refuse the data
    reports: list[DataReport]  # as Rows has them; where rows cannot be used, of that source alone
    examples: list[DrawnExample]
    refusal: UserError | None


def look_at(spec: DataSpec, tokenizer: PreTrainedTokenizerFast, seq_len: int, seed: int, examples: int) -> Look:
    """Makes the rows, and prints what load_rows prints but its example. Draws up to so many examples (draw_examples).

    Where too many rows cannot be used, examples of the others are drawn; where a source is refused as a whole, none.
    """
    rows, refusal = None, None
    try:
        rows = load_rows(spec, tokenizer, seq_len, seed, shows_example=False)
        reports = rows.reports
    except UnusableRows as error:
        reports, refusal = [error.report], error
    except UserError as error:
        return Look(None, [], [], error)
    try:
        drawn = draw_examples(spec, ChatFormat(tokenizer, rendered=spec.rendered), seq_len, seed, examples)
    except UserError as error:  # another source of a mixture is refused as a whole
        return Look(None, reports, [], refusal or error)
    return Look(rows, reports, drawn, refusal)
