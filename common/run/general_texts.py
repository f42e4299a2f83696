"""The texts on which a run measures drift: rows of DataSpec.drift_source, tokenised with the model's own template.

They are no data to train on, so one source may hold rows of several formats, and a row that the model's template
refuses is left out.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from common.data.examples import Examples
from common.data.packing import pack
from common.data.report import DataReport
from common.data.tokenise import Tokeniser, rows_of
from common.machine.collectives import broadcast_on_machine
from common.machine.processes import local_rank
from common.recipe import DataSpec, UserError
from common.sources.source_files import find_files, is_file
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat

MAX_DRIFT_TOKENS = 1 << 14  # of a larger source the first rows are read, up to so many tokens: twice the default's
# Tokens of a packed row. Short rows are shared out evenly over processes, and cost less attention where it has a mask.
DRIFT_ROW_TOKENS = 512


@dataclass(frozen=True)
class GeneralTexts:
    """The texts of a source, packed. rows: as common.data.rows.Rows has them."""

    source: str
    rows: list[dict[str, list[int]]]
    texts: int  # in the rows
    left_out: int  # of those read, because the model's template or tokenizer refuses them


def refuse_missing_texts(source: str | None) -> None:
    """Raises UserError where a DataSpec.drift_source names files that are not there."""
    try:
        if source is not None and is_file(source):
            find_files(source)
    except UserError as error:
        raise UserError(
            f"{error}. It is DataSpec.drift_source, the texts on which a run measures what else it changes: name other "
            "texts, or None to measure nothing"
        ) from error


def load_general_texts(source: str, tokenizer: PreTrainedTokenizerFast, seq_len: int) -> GeneralTexts:
    """Reads and tokenises the rows of a source, up to MAX_DRIFT_TOKENS. Prints a line where not all of them are taken.

    Of a hub data set it reads the split "train". Raises UserError when the source cannot be read, and when none of its
    rows can be used.
    """
    refuse_missing_texts(source)
    texts = broadcast_on_machine(_read_texts(source, tokenizer, seq_len) if local_rank() == 0 else None)
    assert texts is not None  # of the first process of this machine
    return texts


def _read_texts(source: str, tokenizer: PreTrainedTokenizerFast, seq_len: int) -> GeneralTexts:
    spec, chat_format = DataSpec(source), ChatFormat(tokenizer)
    examples, report, is_whole = Examples(), DataReport(source, seq_len), True
    for place, row in rows_of(spec, source, spec.split):
        if report.tokens >= MAX_DRIFT_TOKENS:
            is_whole = False
            break
        tokeniser = Tokeniser(source, chat_format, spec, seq_len)  # of this row alone: the format of the next is free
        try:
            for _, parts in tokeniser.tokenise([(place, row)], report):
                examples.append(parts)
        except UserError as error:  # for example of a base model, which has no template for conversations
            report.add_unused(BadRow(str(error)), place)
    left_out = report.read - report.kept
    tallies = [tally for tally in (report.faults, report.too_long, report.not_to_learn) if tally.total]
    why = max(tallies, key=lambda tally: tally.total).most_frequent() if tallies else "it has none"
    if not report.kept:
        raise UserError(f"no row of {source} (DataSpec.drift_source) can be used to measure drift: {why}")
    if left_out:
        print(f"off the task: {left_out:,} of {report.read:,} rows of {source} are left out: {why}")
    if not is_whole:
        print(f"off the task: of {source} the first {report.read:,} rows are read, {report.tokens:,} tokens")
    longest = max(len(examples[index].input_ids) for index in range(len(examples)))
    rows = pack(examples.table(), max(longest, min(DRIFT_ROW_TOKENS, seq_len))).to_list()
    return GeneralTexts(source, rows, report.kept, left_out)


def texts_if_there(source: str | None, tokenizer: PreTrainedTokenizerFast, seq_len: int) -> GeneralTexts | None:
    """The texts, as load_general_texts; None without a source, and with a line where it cannot be read or used."""
    try:
        return None if source is None else load_general_texts(source, tokenizer, seq_len)
    except UserError as error:
        print(f"off the task: not measured: {error}")
        return None
