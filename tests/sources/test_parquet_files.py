"""Parquet files with more than the recipes read, and with values that Python cannot hold."""

import pyarrow
import pyarrow.parquet
import pytest

from common.conversations.row_reader import RowReader
from common.recipe import UserError
from common.sources.files import read_rows
from common.sources.source_row import BadRow

PROMPTS, ANSWERS = pyarrow.array(["a", "c"]), pyarrow.array(["b", "d"])
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 2, pyarrow.array([b"caf\xe9", b"ok"], pyarrow.binary()).buffers()
)
YEAR_10000 = pyarrow.array([253402300800000] * 2, pyarrow.timestamp("ms"))
ON_MARS = pyarrow.array([0, 0], pyarrow.timestamp("us", tz="Mars/Base"))


def read(folder, columns: list[tuple[str, pyarrow.Array]]) -> list:
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([column for _, column in columns], names=[name for name, _ in columns]), path
    )
    return [row for _, row in read_rows(str(path))]


@pytest.mark.parametrize("extra", [NOT_UTF8, YEAR_10000, ON_MARS], ids=["not UTF-8", "the year 10000", "Mars"])
def test_a_column_that_no_format_reads_may_hold_anything(tmp_path, extra):
    columns = [("id", extra), ("prompt", PROMPTS), ("id", extra), ("completion", ANSWERS), ("prompt.x", extra)]
    assert read(tmp_path, columns) == ROWS


@pytest.mark.parametrize("extra", [YEAR_10000, ON_MARS], ids=["the year 10000", "Mars"])
@pytest.mark.parametrize("kind", [pyarrow.ListArray, pyarrow.LargeListArray])
def test_a_field_of_a_message_that_no_format_reads_may_hold_any_time(tmp_path, extra, kind):
    messages = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user", "assistant"]), PROMPTS, extra], names=["role", "content", "at"]
    )
    offsets = pyarrow.array([0, 2], pyarrow.int64() if kind is pyarrow.LargeListArray else pyarrow.int32())
    (row,) = read(tmp_path, [("messages", kind.from_arrays(offsets, messages))])
    assert [message.content for message in RowReader("messages").read(row).messages] == ["a", "c"]


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        (NOT_UTF8, ["a value that is not UTF-8", None]),
        (pyarrow.array([[("k", 0)], []], pyarrow.map_(pyarrow.string(), ON_MARS.type)), ["a value that cannot", None]),
    ],
    ids=["not UTF-8", "Mars in a map"],
)
def test_a_value_that_cannot_be_read_is_a_row_with_its_number(tmp_path, values, faults):
    rows = read(tmp_path, [("prompt", values), ("completion", ANSWERS)])
    for row, fault in zip(rows, faults, strict=True):
        assert isinstance(row, BadRow) == bool(fault) and str(row).startswith(fault or "{")


@pytest.mark.parametrize(
    "kind",
    [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
    ids=str,
)
def test_every_type_of_text_is_read(tmp_path, kind):
    assert read(tmp_path, [("Prompt", PROMPTS.cast(kind)), ("completion ", ANSWERS.cast(kind))]) == ROWS


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="its columns: 2 keys could be 'completion'"):
        read(tmp_path, [("prompt", PROMPTS), ("completion", ANSWERS), ("completion", ANSWERS)])


def test_a_key_twice_in_a_message_is_a_fault_of_the_row(tmp_path):
    messages = pyarrow.StructArray.from_arrays([PROMPTS, ANSWERS], names=["content", "content"])
    (row,) = read(tmp_path, [("messages", pyarrow.ListArray.from_arrays([0, 2], messages))])
    assert isinstance(row, BadRow) and "duplicate field names" in str(row)
