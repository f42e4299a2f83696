"""Tables of Arrow: .arrow files in both of their formats, folders of save_to_disk, and what no format reads of them."""

from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from common.recipe import UserError
from common.sources.arrow_rows import count_filled
from common.sources.files import read_rows
from common.sources.source_row import BadRow

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
JSON_FEATURES = datasets.Features(
    {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Json()})}
)
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}]


def write_table(table: pyarrow.Table, path, how: str) -> str:
    if how == "parquet":
        path = path.with_suffix(".parquet")
        pyarrow.parquet.write_table(table, path)
    elif how == "saved":
        path = path.with_suffix("")
        datasets.Dataset(table).save_to_disk(str(path))
    else:
        writers = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}
        with writers[how](path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
    return str(path)


@pytest.fixture(params=["stream", "file", "saved", "parquet"])
def written(request, tmp_path):
    return lambda table: write_table(table, tmp_path / "a.arrow", request.param)


def test_every_table_gives_the_same_rows_with_their_numbers(written):
    source = written(pyarrow.Table.from_pylist(ROWS))
    assert list(read_rows(source)) == [(f"{source}, row 1", ROWS[0]), (f"{source}, row 2", ROWS[1])]


@pytest.mark.parametrize(
    ("values", "count"),
    [
        (["x", None], 1),
        ([None, None], 0),
        ([1, 2], 2),
        ([[1.5], []], 1),
        ([[], None], 0),
        ([{"a": 1}, None], 1),
    ],
)
def test_the_rows_with_a_value_in_a_column_that_no_format_reads_are_counted(written, values, count):
    unread = Counter()
    table = pyarrow.Table.from_pylist([row | {"id": value} for row, value in zip(ROWS, values, strict=True)])
    assert [row for _, row in read_rows(written(table), unread=unread)] == ROWS
    assert unread == ({"id": count} if count else {})


@pytest.mark.parametrize("name", ["images", "Image", "videos", " audio "])
def test_pictures_and_sounds_are_refused_unless_there_are_none(written, name):
    empty = pyarrow.Table.from_pylist([row | {name: value} for row, value in zip(ROWS, ([], None), strict=True)])
    assert [row for _, row in read_rows(written(empty))] == ROWS


@pytest.mark.parametrize("name", ["images", "Image", "videos", " audio "])
@pytest.mark.parametrize("value", [[b"1"], b"1", {"bytes": b"1", "path": None}, "a.png"], ids=str)
def test_a_column_with_pictures_or_sounds_is_refused(written, name, value):
    table = pyarrow.Table.from_pylist([ROWS[0] | {name: None}, ROWS[1] | {name: value}])
    with pytest.raises(UserError, match=f"has values in its column '{name}', and only text can be trained"):
        list(read_rows(written(table)))


def test_a_text_that_datasets_keeps_as_json_has_no_quotes(written):
    data = datasets.Dataset.from_dict({"messages": [MESSAGES[:1], MESSAGES]}, features=JSON_FEATURES)
    rows = [row["messages"] for _, row in read_rows(written(data.data.table))]
    assert rows == [MESSAGES[:1], MESSAGES]


def test_broken_json_in_such_a_text_is_a_row_with_its_number(written):
    kind = pyarrow.json_()
    texts = pyarrow.ExtensionArray.from_storage(kind, pyarrow.array(['"a"', '{"b": NaN}']))
    (_, first), (place, second) = read_rows(written(pyarrow.table({"text": texts})))
    assert first == {"text": "a"} and isinstance(second, BadRow) and "NaN" in str(second) and "row 2" in place


@pytest.mark.parametrize(
    "kind",
    [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
    ids=str,
)
def test_every_type_of_text_is_read(tmp_path, kind):
    table = pyarrow.table(
        {name: pyarrow.array([row[name] for row in ROWS]).cast(kind) for name in ("prompt", "completion")}
    )
    assert [row for _, row in read_rows(write_table(table, tmp_path / "a.arrow", "stream"))] == ROWS


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_saved_data_set_with_splits_is_read_by_its_split(split, tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    ((place, row),) = read_rows(str(tmp_path / "saved"), split=split)
    assert row == ROWS[split == "test"] and place == f"{tmp_path}/saved/{split}, row 1"
    with pytest.raises(UserError, match="saved has no split 'tran'; it has train, test"):
        list(read_rows(str(tmp_path / "saved"), split="tran"))


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("damage", ["", "{"])
def test_a_damaged_saved_data_set_is_one_line(name, damage, tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / name).write_text(damage)
    with pytest.raises(UserError, match="saved is no readable data set of save_to_disk: "):
        list(read_rows(str(tmp_path / "saved")))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("rows_per_group", [1, 10])
def test_a_parquet_file_counts_in_every_group_with_statistics_and_without(tmp_path, statistics, rows_per_group):
    table = pyarrow.table(
        {"text": ["a"] * 5, "text.id": [1, None, 3, None, None], "tags": [["a", "b"], [], None, ["c"], []]}
    )
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, write_statistics=statistics, row_group_size=rows_per_group)
    unread = Counter()
    assert len(list(read_rows(str(path), unread=unread))) == 5
    if rows_per_group == 1 or not statistics:
        assert unread == {"text.id": 2, "tags": 2}
    else:
        assert unread == {"text.id": 2, "tags": 3}  # the statistics count the values of lists, not the lists


def test_an_empty_text_is_no_value():
    assert count_filled(pyarrow.array(["", None, "a"])) == 1
    assert count_filled(pyarrow.array([[("k", 1)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int32()))) == 1
    assert count_filled(pyarrow.array([], pyarrow.string())) == 0
