"""Data of another kind than the recipe's is refused with a line that names the right recipe."""

import json

import pandas
import pytest

from common.conversations.row_reader import RowReader
from common.data.rows import load_rows
from common.recipe import DataSpec, LoraSpec, ModelSpec, PreferenceSpec, Recipe, TrainSpec, UserError
from common.sources.source_row import BadRow, OtherKind

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
RATED = {"prompt": "a", "completion": "b", "label": True}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
WRONG = [
    (None, PAIR, ("MODEL=tiny-dpo or llama3-8b-dpo, or add preference=PreferenceSpec('dpo')",)),
    (None, RATED, ("MODEL=tiny-dpo or llama3-8b-dpo with loss='kto', or add preference=PreferenceSpec('kto')",)),
    ("dpo", CHAT, ("take a recipe without PreferenceSpec(...), as MODEL=tiny and llama3-8b are",)),
    ("dpo", RATED, ("set preference=PreferenceSpec('kto')",)),
    ("kto", CHAT, ("add a label to each row", "as MODEL=tiny and llama3-8b are")),
    ("kto", PAIR, ("take PreferenceSpec('dpo'), as MODEL=tiny-dpo and llama3-8b-dpo do",)),
]


def data(source: str, loss: str | None, **values: object) -> DataSpec:
    """The DataSpec of a recipe that learns with this loss; None learns from conversations."""
    preference = None if loss is None else PreferenceSpec(loss)
    spec = DataSpec(source, **values)
    return Recipe(ModelSpec("m"), spec, LoraSpec(8, 16), TrainSpec(64, 1, 1e-3), preference=preference).data


@pytest.mark.parametrize(("loss", "row", "lines"), WRONG)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_data_of_another_kind_is_refused_with_the_right_recipe(tmp_path, tokenizer, loss, row, lines, suffix):
    path = tmp_path / f"a.{suffix}"
    rows = [row] * 30
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        cells = [{name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows]
        pandas.DataFrame(cells).to_csv(path, index=False)
    with pytest.raises(UserError) as error:
        load_rows(data(str(path), loss), tokenizer, 64)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    for line in lines:
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("kind", "good", "other"), [("pairs", PAIR, CHAT), ("rated", RATED, CHAT), ("rated", RATED, PAIR)]
)
def test_a_single_row_of_another_kind_among_the_right_ones_is_a_fault(kind, good, other):
    reader = RowReader(kind=kind)
    reader.read(good)
    with pytest.raises(BadRow, match="as the rows above it are") as error:
        reader.read(other)
    assert not isinstance(error.value, OtherKind)


def test_one_pair_among_conversations_refuses_the_source():
    reader = RowReader()
    reader.read(CHAT)
    with pytest.raises(OtherKind):
        reader.read(PAIR)
