"""What says not to learn an answer is obeyed, in every shape that people have."""

import pytest

from common.conversations.row_reader import RowReader
from common.sources.source_row import BadRow, NotToLearn, OtherKind

ASK, SAY = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
LEARN = [("weight", 1), ("weight", 1.0), ("train", True), ("loss", True), ("loss_weight", 1.0), ("masked", False)]
LEARN += [("training", True), ("learn", 1), ("loss_mask", 1), ("weight", None), ("train", "true")]
SKIP = [("weight", 0), ("weight", 0.0), ("train", False), ("loss", False), ("loss_weight", 0.0), ("masked", True)]
SKIP += [
    ("training", False),
    ("train_on_turn", False),
    ("learn", 0),
    ("loss_mask", 0),
    ("masked", 1),
    ("train", "False"),
    ("Weight", 0),
]


def learnt(row: dict) -> list[bool]:
    return [m.is_trained for m in RowReader().read(row).messages if m.role == "assistant"]


@pytest.mark.parametrize(("name", "value"), SKIP)
def test_a_message_that_says_so_is_not_learnt(name, value):
    assert learnt({"messages": [ASK, SAY | {name: value}, ASK, SAY]}) == [False, True]


@pytest.mark.parametrize(("name", "value"), LEARN)
def test_a_message_that_says_to_learn_it_is_learnt(name, value):
    assert learnt({"messages": [ASK, SAY | {name: value}]}) == [True]


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize(("name", "value"), SKIP)
def test_a_sharegpt_turn_that_says_so_is_not_learnt(key, name, value):
    turns = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    entries = [{"from": role, "value": text} for role, text in turns]
    entries[1][name] = value
    assert learnt({key: entries}) == [False, True]


def test_one_flag_that_says_no_is_enough():
    assert learnt({"messages": [ASK, SAY | {"weight": 1, "train": False}, ASK, SAY]}) == [False, True]


def test_a_call_of_a_tool_can_be_left_unlearnt():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "weight": 0}
    turns = [
        {"from": "human", "value": "a"},
        call,
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b"},
    ]
    assert learnt({"conversations": turns}) == [False, True]


@pytest.mark.parametrize(("name", "value"), SKIP)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY]},
        {"prompt": "Hello", "completion": "Hi"},
        {"instruction": "Hello", "output": "Hi"},
        {"text": "Once upon a time"},
    ],
    ids=lambda row: "+".join(row),
)
def test_a_row_that_says_so_is_left_out(row, name, value):
    with pytest.raises(NotToLearn, match="the row says not to learn it"):
        RowReader().read(row | {name: value})


def test_a_row_whose_answers_all_say_so_is_left_out():
    with pytest.raises(NotToLearn):
        RowReader().read({"messages": [ASK, SAY | {"weight": 0}, ASK, SAY | {"train": False}]})


@pytest.mark.parametrize(("name", "value"), LEARN)
def test_a_row_that_says_to_learn_it_is_learnt(name, value):
    assert learnt({"prompt": "Hello", "completion": "Hi"} | {name: value}) == [True]


@pytest.mark.parametrize("value", [0.5, 2, -1, float("nan"), [0], "half"], ids=repr)
@pytest.mark.parametrize("name", ["weight", "loss_weight", "train"])
def test_a_weight_in_between_is_refused_by_name(name, value):
    with pytest.raises(BadRow, match=f"'{name}' is .*weights other than 0 and 1 are not supported"):
        RowReader().read({"messages": [ASK, SAY | {name: value}]})


@pytest.mark.parametrize("name", ["weight", "loss"])
def test_a_number_in_between_in_a_row_is_refused_by_name(name):
    with pytest.raises(BadRow, match=f"'{name}' is 0.5; .* rename the key"):
        RowReader().read({"prompt": "a", "completion": "b", name: 0.5})


@pytest.mark.parametrize("value", ["train", "test", "a bachelor's degree"])
def test_a_column_of_words_with_the_name_of_a_flag_is_a_column_like_any_other(value):
    reader = RowReader()
    reader.read({"prompt": "a", "completion": "b", "training": value})
    assert reader.unread == {"training": 1}


def test_a_flag_that_peers_read_both_ways_is_refused():
    with pytest.raises(BadRow, match="'mask' can mean to learn the answer or not to"):
        RowReader().read({"messages": [ASK, SAY | {"mask": 1}]})


def test_parts_of_an_answer_to_learn_are_refused():
    with pytest.raises(BadRow, match="'train_detail' names parts of an answer to learn"):
        RowReader().read({"messages": [ASK, SAY | {"train_detail": [{"begin_offset": 0, "train": False}]}]})


def test_a_user_turn_that_is_to_be_learnt_is_counted_as_unread():
    reader = RowReader()
    reader.read({"messages": [ASK | {"train": True}, SAY]})
    reader.read({"messages": [ASK | {"train": False, "weight": 0}, SAY]})
    assert reader.unread == {"messages[].train": 1}


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("name", ["label", "Label", "kto_tag"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY]},
        {"prompt": "Hello", "completion": "Hi"},
        {"prompt": [ASK], "completion": [SAY]},
        {"instruction": "Hello", "input": "", "output": "Hi"},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    ],
    ids=lambda row: "+".join(row),
)
def test_rows_with_a_preference_label_are_refused_as_a_whole(row, name, label):
    with pytest.raises(OtherKind, match="preference data .* is true or false, as KTO takes it"):
        RowReader().read(row | {name: label})


@pytest.mark.parametrize("tag", [0, 1, "0", "1", 1.0])
def test_a_tag_for_kto_is_one_however_true_and_false_are_written(tag):
    with pytest.raises(OtherKind):
        RowReader().read({"instruction": "a", "output": "b", "kto_tag": tag})


@pytest.mark.parametrize("label", ["True", "false", "TRUE"])
def test_a_preference_label_of_a_csv_file_is_one_too(label):
    with pytest.raises(OtherKind):
        RowReader().read({"prompt": "a", "completion": "b", "label": label})


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"prompt": "a", "completion": "b", "label": "positive"}, {"label": 1}),
        ({"prompt": "a", "completion": "b", "label": 3}, {"label": 1}),
        ({"prompt": "a", "completion": "b", "label": 0}, {"label": 1}),
        ({"text": "a", "label": True}, {"label": 1}),
        ({"text": "a", "label": 1}, {"label": 1}),
        ({"prompt": "a", "completion": "b", "label": None}, {}),
    ],
)
def test_another_label_is_a_column_like_any_other(row, unread):
    reader = RowReader()
    reader.read(row)
    assert reader.unread == unread


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]},
        {"chosen": [ASK, SAY], "rejected": [ASK, SAY]},
        {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"},
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        {"prompt": "a", "chosen": [ASK, SAY], "rejected": [ASK, SAY], "messages": [ASK, SAY], "score_chosen": 7.5},
        {"messages": [ASK, SAY], "rejected_response": "No."},
        {"messages": [ASK, SAY], "rejected_messages": [SAY]},
        {"input": {"messages": [ASK]}, "preferred_output": [SAY], "non_preferred_output": [SAY]},
    ],
    ids=lambda row: "+".join(row),
)
def test_better_and_worse_answers_are_refused_as_a_whole(row):
    with pytest.raises(OtherKind, match="preference data .*, as DPO takes them.*keep the better answers alone"):
        RowReader().read(row)


def test_the_better_answers_are_learnt_where_columns_name_them():
    reader = RowReader(columns={"user": "prompt", "assistant": "chosen"})
    assert reader.read({"prompt": "a", "chosen": "b", "rejected": "c"}).messages[1].content == "b"
    assert reader.unread == {"rejected": 1}
