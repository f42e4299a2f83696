"""Better and worse answers in the formats of others; TRL's own code says what the prompt and the answers are."""

import json
from typing import Any

import pytest
from trl import extract_prompt

from common.conversations.conversation import Conversation, Message, Preference, ToolCall
from common.conversations.row_reader import RowReader
from common.sources.source_row import BadRow, NotToLearn, OtherKind

ASK, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
)
SHARED_ASK, SHARED_GOOD, SHARED_BAD = (
    {"from": name, "value": text} for name, text in (("human", "a"), ("gpt", "b"), ("gpt", "c"))
)
PAIR = ([ASK], [GOOD], [BAD])
SYSTEM = {"role": "system", "content": "s"}
MORE = [ASK, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]


def in_turns(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def read(row: dict[str, Any], columns: dict[str, str] | None = None) -> tuple[list, list, list]:
    """Prompt, chosen and rejected answer, as messages."""
    example = RowReader(kind="pairs", columns=columns).read(row)
    assert isinstance(example, Preference) and example.signs == (1, -1)
    chosen, rejected = (conversation.messages for conversation in example.conversations)
    trained = [[m.role == "assistant" and m.is_trained for m in messages] for messages in (chosen, rejected)]
    first = trained[0].index(True)
    assert first == trained[1].index(True) and chosen[:first] == rejected[:first]
    return in_turns(chosen[:first]), in_turns(chosen[first:]), in_turns(rejected[first:])


@pytest.mark.parametrize(
    ("row", "becomes"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, PAIR),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PAIR),
        ({"chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])}, PAIR),
        ({"prompt": [ASK], "chosen": "b", "rejected": "c"}, PAIR),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, PAIR),
        ({"prompt": "a", "chosen": GOOD, "rejected": BAD}, PAIR),
        ({"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]}, PAIR),
        ({"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PAIR),
        (
            {"prompt": [ASK], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
            ([SYSTEM, ASK], [GOOD], [BAD]),
        ),
        ({"prompt": "e", "chosen": [*MORE, GOOD], "rejected": [*MORE, BAD]}, (MORE, [GOOD], [BAD])),
        ({"chosen": [*MORE, GOOD], "rejected": [*MORE, BAD]}, (MORE, [GOOD], [BAD])),
        ({"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, BAD]}, ([ASK], [GOOD, ASK, GOOD], [BAD])),
        ({"conversations": [SHARED_ASK], "chosen": SHARED_GOOD, "rejected": SHARED_BAD}, PAIR),
        ({"conversations": [SHARED_ASK], "chosen": [SHARED_GOOD], "rejected": [SHARED_BAD]}, PAIR),
        (
            {"conversations": [SHARED_ASK], "chosen": "b", "rejected": "c", "system": "s"},
            ([SYSTEM, ASK], [GOOD], [BAD]),
        ),
        ({"messages": [ASK], "chosen": GOOD, "rejected": BAD}, PAIR),
        ({"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, ([SYSTEM, ASK], [GOOD], [BAD])),
        ({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, PAIR),
        ({"instruction": "a", "chosen_response": "b", "rejected_response": "c"}, PAIR),
        ({"instruction": "e", "history": [["a", "d"]], "chosen": "b", "rejected": "c"}, (MORE, [GOOD], [BAD])),
        ({"input": "a", "chosen": "b", "rejected": "c"}, PAIR),
        ({"messages": [ASK, GOOD], "rejected_response": "c"}, PAIR),
        ({"messages": [*MORE, GOOD], "rejected_response": "c"}, (MORE, [GOOD], [BAD])),
        ({"messages": [ASK, GOOD], "rejected_messages": [ASK, BAD]}, PAIR),
        ({"query": "a", "response": "b", "rejected_response": "c"}, PAIR),
        ({"input": {"messages": [ASK], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, PAIR),
        ({"Prompt": "a", " chosen": "b", "REJECTED": "c"}, PAIR),
    ],
    ids=lambda row: "+".join(row) if isinstance(row, dict) else "",
)
def test_a_pair_has_a_prompt_and_two_answers(row, becomes):
    assert read(row) == becomes


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"user": "frage", "chosen": "gut", "rejected": "schlecht"}, {"frage": "a", "gut": "b", "schlecht": "c"}),
        (
            {"messages": "dialog", "chosen": "gut", "rejected": "schlecht"},
            {"dialog": [ASK], "gut": GOOD, "schlecht": BAD},
        ),
        (
            {"chosen": "chosen", "rejected": "rejected"},
            {"prompt": "Human: a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        ),
    ],
)
def test_columns_name_the_prompt_and_the_answers(columns, row):
    assert read(row, columns) == PAIR


# The forms of docs/source/dataset_formats.md in TRL's repository: preference, with and without the prompt.
@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": [{"role": "user", "content": "What color is the sky?"}],
            "chosen": [{"role": "assistant", "content": "It is blue."}],
            "rejected": [{"role": "assistant", "content": "It is green."}],
        },
        {
            "chosen": [
                {"role": "user", "content": "What color is the sky?"},
                {"role": "assistant", "content": "It is blue."},
            ],
            "rejected": [
                {"role": "user", "content": "What color is the sky?"},
                {"role": "assistant", "content": "It is green."},
            ],
        },
        {"chosen": [SYSTEM, *MORE, GOOD], "rejected": [SYSTEM, *MORE, BAD]},
        {"chosen": [*MORE, GOOD, ASK, GOOD], "rejected": [*MORE, BAD, ASK, GOOD]},
    ],
)
def test_prompt_and_answers_are_those_that_trl_extracts(row):
    taken = row if "prompt" in row else extract_prompt(row)
    assert read(row) == (taken["prompt"], taken["chosen"], taken["rejected"])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "its two answers are the same"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "its two answers are the same"),
        (
            {"chosen": [ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
            "different prompts: they differ in a turn of the system",
        ),
        ({"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "x"}, BAD]}, "differ in a turn of the user"),
        ({"chosen": [ASK, GOOD], "rejected": [BAD]}, "different prompts"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}, "goes on where the other one ends"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no question stands before its two answers"),
        ({"chosen": "a b", "rejected": "a c"}, "chosen is a text, and there is no prompt"),
        ({"chosen": [ASK, GOOD], "rejected": "c"}, "rejected is a text, and there is no prompt"),
        ({"prompt": "x", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "its prompt is none of the turns of chosen"),
        ({"prompt": "a", "chosen": [ASK, GOOD], "rejected": [BAD]}, "its prompt is none of the turns of rejected"),
        ({"prompt": [SYSTEM, ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "its prompt is none of the turns"),
        ({"prompt": [ASK, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "prompt ends with an answer"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c", "d"]}, "rejected is a list of 2 texts"),
        (
            {"prompt": "a", "chosen": json.dumps([GOOD]), "rejected": "c"},
            "chosen is a text that holds a list of messages",
        ),
        ({"prompt": [ASK], "chosen": [GOOD | {"weight": 0}], "rejected": [BAD]}, "marked as not to be learnt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}, "it has images"),
        (
            {"prompt": "a", "question": "d", "chosen": "b", "rejected": "c"},
            "it can be read as prompt/chosen/rejected and as ",
        ),
        (
            {"chosen": "b", "rejected_text": "c"},
            "no format has these keys: 'chosen', 'rejected_text'; a row needs prompt",
        ),
        ({"rejected_response": "c"}, "no format has these keys: 'rejected_response'"),
    ],
)
def test_an_unclear_pair_is_a_fault(row, fault):
    with pytest.raises(BadRow, match=fault) as error:
        RowReader(kind="pairs").read(row)
    assert not isinstance(error.value, OtherKind)


def test_a_pair_that_says_two_things_names_columns_that_help():
    row = {"prompt": "a", "question": "d", "chosen": "b", "rejected": "c"}
    with pytest.raises(BadRow, match=r"columns=\{'user': 'question', 'chosen': 'chosen', 'rejected': 'rejected'\}"):
        RowReader(kind="pairs").read(row)


def test_a_pair_that_says_not_to_learn_it_is_left_out():
    with pytest.raises(NotToLearn):
        RowReader(kind="pairs").read({"prompt": "a", "chosen": "b", "rejected": "c", "train": False})


def test_tools_and_calls_of_a_pair_are_read_on_both_sides():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    row = {
        "input": {"messages": [ASK], "tools": [{"name": "f"}]},
        "preferred_output": [call],
        "non_preferred_output": [BAD],
    }
    example = RowReader(kind="pairs").read(row)
    assert [[tool["function"]["name"] for tool in side.tools] for side in example.conversations] == [["f"], ["f"]]
    assert example.conversations[0].messages[-1].tool_calls == (ToolCall("f", {"x": 1}),)


def test_what_is_not_read_of_a_pair_is_told():
    reader = RowReader(kind="pairs")
    reader.read(
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7.5, "label": True, "reasoning_content": "r"}
    )
    assert reader.unread == {"score_chosen": 1, "label": 1, "reasoning_content": 1}
    reader = RowReader(kind="pairs")
    reader.read({"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD | {"id": 3}], "history": [["x", "y"]]})
    assert reader.unread == {"history": 1, "rejected[].id": 1}


@pytest.mark.parametrize(
    ("row", "rated", "is_good"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, [GOOD], True),
        ({"prompt": [ASK], "completion": [BAD], "label": False}, [BAD], False),
        ({"prompt": "a", "completion": "b", "label": "true"}, [GOOD], True),
        ({"prompt": "a", "completion": "b", "label": 0}, [GOOD], False),
        ({"instruction": "a", "input": "", "output": "b", "kto_tag": "False"}, [GOOD], False),
        ({"messages": [ASK, GOOD], "label": True}, [GOOD], True),
        ({"messages": [ASK, BAD, ASK, GOOD], "kto_tag": False}, [GOOD], False),
        ({"conversations": [SHARED_ASK, SHARED_GOOD], "kto_tag": True}, [GOOD], True),
        ({"prompt": [ASK], "completion": [BAD, ASK, GOOD], "label": True}, [BAD, ASK, GOOD], True),
        ({"system": "s", "prompt": "a", "completion": "b", "history": [["x", "y"]], "label": True}, [GOOD], True),
    ],
    ids=lambda row: "+".join(row) if isinstance(row, dict) else "",
)
def test_a_rated_answer_is_the_completion_or_the_last_turn(row, rated, is_good):
    example = RowReader(kind="rated").read(row)
    (conversation,) = example.conversations
    assert example.signs == (1 if is_good else -1,)
    first = next(i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.is_trained)
    assert in_turns(conversation.messages[first:]) == rated


def test_a_call_and_what_is_said_after_its_result_are_rated_together():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = {"messages": [ASK, GOOD, ASK, call, {"role": "tool", "content": "1"}, BAD], "label": True}
    (conversation,) = RowReader(kind="rated").read(row).conversations
    assert [m.is_trained for m in conversation.messages if m.role == "assistant"] == [False, True, True]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a", "completion": "b", "label": None}, "its label is missing"),
        ({"prompt": "a", "completion": "b", "label": "positive"}, "'label' is 'positive'; true is for a good answer"),
        ({"prompt": "a", "completion": "b", "label": 4}, "'label' is 4; true is for a good answer"),
        ({"prompt": "a", "completion": "b", "label": True, "kto_tag": False}, "its label and its kto_tag differ"),
        ({"messages": [ASK], "label": True}, "it has no turn of the assistant"),
        ({"messages": [ASK, GOOD | {"train": False}], "label": True}, "the row says not to learn it"),
    ],
)
def test_an_unclear_rating_is_a_fault(row, fault):
    with pytest.raises(BadRow, match=fault):
        RowReader(kind="rated").read(row)


def test_columns_name_the_label():
    columns = {"user": "q", "assistant": "r", "label": "thumbs_up"}
    example = RowReader(kind="rated", columns=columns).read({"q": "a", "r": "b", "thumbs_up": True})
    assert example.signs == (1,)
    with pytest.raises(BadRow, match="its label is missing"):
        RowReader(kind="rated", columns={"user": "q", "assistant": "r"}).read({"q": "a", "r": "b"})


def test_a_reader_of_any_kind_takes_each_row_for_what_it_is():
    pair = RowReader(kind=None).read({"prompt": "a", "chosen": "b", "rejected": "c"})
    rated = RowReader(kind=None).read({"prompt": "a", "completion": "b", "label": False})
    assert (pair.signs, rated.signs) == ((1, -1), (-1,))
    assert isinstance(RowReader(kind=None).read({"prompt": "a", "completion": "b", "label": "news"}), Conversation)
    assert RowReader(kind=None).read({"text": "a"}) == "a"
