"""Rows in the shapes of files that people bring, and of the peers' documentation: what becomes of each.

The shapes are theirs, the contents are ours.
"""

import ast
import json

import pytest

from common.conversations.conversation import Conversation, Message, ToolCall
from common.conversations.row_reader import RowReader
from common.sources.source_row import BadRow, OtherKind


def turns(*said: str, role: str = "role", content: str = "content", names=("user", "assistant")) -> list[dict]:
    """User and assistant in turn."""
    return [{role: names[n % 2], content: text} for n, text in enumerate(said)]


def shared(*said: str) -> list[dict]:
    return turns(*said, role="from", content="value", names=("human", "gpt"))


TWO, FOUR = ("Hello", "Hi"), ("Hello", "Hi", "Bye", "See you")
SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN_TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}

# From the name of the source to a row of it, the texts of its messages, and the names that are not used.
SHAPES: dict[str, tuple[dict, tuple[str, ...], set[str]]] = {
    "OpenAI, fine-tuning of chats": ({"messages": [SYSTEM, *turns(*TWO)]}, ("Be brief.", *TWO), set()),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Bye", "input": "", "output": "See you", "system": "S", "history": [list(TWO)]},
        ("S", *FOUR),
        set(),
    ),
    "LLaMA-Factory, ShareGPT": ({"conversations": shared(*FOUR), "system": "S", "tools": "[]"}, ("S", *FOUR), set()),
    "LLaMA-Factory, no media": ({"messages": turns(*TWO), "images": [], "videos": None}, TWO, set()),
    "FastChat": ({"id": "identity_0", "conversations": shared(*FOUR)}, FOUR, {"id"}),
    "GPTeacher": ({"instruction": "Hello", "input": "a", "response": "Hi"}, ("Hello\n\na", "Hi"), set()),
    "Code Alpaca": ({"instruction": "Hello", "input": "", "output": "Hi"}, TWO, set()),
    "Alpaca with its rendered text": (
        {"instruction": "Hello", "input": "", "output": "Hi", "text": "### Instruction: Hello ### Response: Hi"},
        TWO,
        {"text"},
    ),
    "Alpaca, an empty instruction": ({"instruction": "", "input": "Hello", "output": "Hi"}, TWO, set()),
    "Dolly": (
        {"instruction": "Hello", "context": "a", "response": "Hi", "category": "open_qa"},
        ("Hello\n\na", "Hi"),
        {"category"},
    ),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "S", "question": "Hello", "response": "Hi"},
        ("S", *TWO),
        {"id"},
    ),
    "OpenOrca, no system prompt": ({"system_prompt": "", "question": "Hello", "response": "Hi"}, TWO, set()),
    "GSM8K": ({"question": "Hello", "answer": "Hi"}, TWO, set()),
    "SQL with its tables": (
        {"question": "Hello", "context": "CREATE TABLE a", "answer": "Hi"},
        ("Hello\n\nCREATE TABLE a", "Hi"),
        set(),
    ),
    "MetaMath": (
        {"query": "Hello", "response": "Hi", "type": "GSM", "original_question": "Hey"},
        TWO,
        {"type", "original_question"},
    ),
    "ms-swift, a query with its history": (
        {"system": "S", "query": "Bye", "response": "See you", "history": [list(TWO)]},
        ("S", *FOUR),
        set(),
    ),
    "ms-swift, pairs": (
        {"system": "S", "conversation": [{"human": "Hello", "assistant": "Hi"}]},
        ("S", *TWO),
        set(),
    ),
    "Magpie": (
        {"uuid": "1", "instruction": "Hello", "response": "Hi", "conversations": shared(*TWO), "reward": 0.5},
        TWO,
        {"uuid", "instruction", "response", "reward"},
    ),
    "Magpie, several turns": (
        {"instruction": "Hello", "response": "Hi", "conversations": shared(*FOUR)},
        FOUR,
        {"instruction", "response"},
    ),
    "SmolTalk": ({"messages": turns(*FOUR), "source": "smol"}, FOUR, {"source"}),
    "ShareGPT with a system turn": (
        {"conversations": [{"from": "system", "value": "S"}, *shared(*TWO)], "id": "a"},
        ("S", *TWO),
        {"id"},
    ),
    "UltraChat": (
        {"prompt": "Hello", "prompt_id": "f0", "messages": turns(*FOUR)},
        FOUR,
        {"prompt", "prompt_id"},
    ),
    "Tulu": ({"id": "t_1", "messages": turns(*TWO), "source": "flan"}, TWO, {"id", "source"}),
    "NuminaMath": (
        {"source": "a", "problem": "Hello", "solution": "Hi", "messages": turns(*TWO)},
        TWO,
        {"source", "problem", "solution"},
    ),
    "a problem and its solution": ({"problem": "Hello", "solution": "Hi", "answer": "3"}, TWO, {"answer"}),
    "Hermes, function calling": (
        {
            "id": "h",
            "conversations": [
                {"from": "system", "value": "Call <tools>[]</tools>"},
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "<tool_call>{}</tool_call>"},
                {"from": "tool", "value": "<tool_response>1</tool_response>"},
                {"from": "gpt", "value": "Hi"},
            ],
            "category": "x",
        },
        ("Call <tools>[]</tools>", "Hello", "<tool_call>{}</tool_call>", "<tool_response>1</tool_response>", "Hi"),
        {"id", "category"},
    ),
    "OpenThoughts": (
        {"system": "Think.", "conversations": turns(*TWO, role="from", content="value")},
        ("Think.", *TWO),
        set(),
    ),
    "Capybara": (
        {"source": "x", "conversation": [{"input": "Hello", "output": "Hi"}, {"input": "Bye", "output": "See you"}]},
        FOUR,
        {"source"},
    ),
    "WildChat": (
        {"conversation": [m | {"language": "English", "toxic": False} for m in turns(*TWO)], "turn": 1},
        TWO,
        {"conversation[].language", "conversation[].toxic", "turn"},
    ),
    "NeMo": (
        {"mask": "User", "system": "S", "conversations": turns(*TWO, names=("User", "Assistant"))},
        ("S", *TWO),
        {"mask"},
    ),
    "TRL, language modeling": ({"text": "Hello"}, ("Hello",), set()),
    "TRL, prompt and completion": ({"prompt": "Hello", "completion": "Hi"}, TWO, set()),
    "TRL, both as messages": ({"prompt": turns("Hello"), "completion": [turns(*TWO)[1]]}, TWO, set()),
    "OASST, threads as text": ({"text": "### Human: Hello### Bot: Hi"}, ("### Human: Hello### Bot: Hi",), set()),
    "a prompt and a response": ({"prompt": "Hello", "response": "Hi", "id": 3}, TWO, {"id"}),
    "an input and an output": ({"input": "Hello", "output": "Hi"}, TWO, set()),
    "a user and an assistant": ({"system": "S", "user": "Hello", "assistant": "Hi"}, ("S", *TWO), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_of_a_public_shape_is_read_and_what_is_not_used_is_named(name):
    row, texts, unread = SHAPES[name]
    reader = RowReader()
    example = reader.read(row)
    assert ([example] if isinstance(example, str) else [m.content for m in example.messages]) == list(texts)
    assert set(reader.unread) == unread


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_that_went_through_a_table_is_read_the_same(name):
    """A table gives every row all columns, null where there is nothing."""
    row, _, unread = SHAPES[name]
    reader = RowReader()
    more = dict.fromkeys(("tools", "images", "label", "weight", "history", "extra"))
    assert reader.read(more | row) == RowReader().read(row)
    assert set(reader.unread) == unread


def test_a_call_in_openais_shape():
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    row = {
        "messages": [
            turns("Rain?")[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "dry"},
            {"role": "assistant", "content": "No.", "weight": 1},
        ],
        "tools": [{"type": "function", "function": PLAIN_TOOL}],
        "parallel_tool_calls": False,
    }
    reader = RowReader()
    example = reader.read(row)
    assert example == Conversation(
        (
            Message("user", "Rain?"),
            Message("assistant", "", tool_calls=(ToolCall("look", {"at": "sky"}, "c1"),)),
            Message("tool", "dry", tool_call_id="c1"),
            Message("assistant", "No."),
        ),
        ({"type": "function", "function": PLAIN_TOOL},),
    )
    assert reader.unread == {"parallel_tool_calls": 1}


def test_a_table_of_calls_is_read_as_its_lines_of_json():
    """Columns of a table have one type: where one message has calls, all have a null."""
    pyarrow = pytest.importorskip("pyarrow")
    call = {"function": {"name": "look", "arguments": json.dumps({"at": "sky"})}}
    row = {"messages": [*turns("Rain?"), {"role": "assistant", "tool_calls": [call]}, *turns("", "No.")[1:]]}
    (from_table,) = pyarrow.Table.from_pylist([row]).to_pylist()
    assert from_table != row
    assert RowReader().read(from_table) == RowReader().read(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns(*TWO), "label": True},
        {"prompt": turns("Hello"), "completion": [turns(*TWO)[1]], "label": False},
        {"instruction": "Hello", "input": "", "output": "Hi", "kto_tag": False},
        {"conversations": shared("Hello"), "chosen": shared(*TWO)[1], "rejected": shared(*TWO)[1]},
        {"system": "S", "question": "Hello", "chosen": "Hi", "rejected": "No"},
        {"prompt": "Hello", "prompt_id": "1", "chosen": turns(*TWO), "rejected": turns(*TWO), "messages": turns(*TWO)},
    ],
    ids=["LLaMA-Factory, KTO", "TRL, unpaired", "Alpaca, KTO", "LLaMA-Factory, DPO", "Orca pairs", "UltraFeedback"],
)
def test_rows_of_preferences_are_named_as_such(row):
    with pytest.raises(OtherKind):
        RowReader().read(row)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": turns("<image>What?", "A cat."), "images": ["cat.jpg"]}, "it has images"),
        ({"prompt": "Hello"}, "no format has these keys: 'prompt'"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "no format has these keys: 'prompt', 'completions'"),
        ({"message_id": "1", "parent_id": "2", "text": "Hello", "role": "prompter"}, "the row is one message"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "no format has these keys: 'input_ids', 'labels'"),
        ({"instruction": "Hello", "input": "", "output": ["Hi", "Go away"]}, "output is a list of 2 texts"),
        ({"question": "Hello", "context": ["One.", "Two."], "answer": "Hi"}, "context is a list of 2 texts"),
        ({"segments": [{"label": True, "text": "a"}]}, "no format has these keys: 'segments'"),
    ],
    ids=["LLaMA-Factory, pictures", "TRL, prompts", "TRL, stepwise", "OASST, trees", "tokenised"]
    + ["LLaMA-Factory, older pairs", "PubMedQA, paragraphs", "axolotl, segments"],
)
def test_rows_of_other_kinds_say_what_they_are(row, fault):
    with pytest.raises(BadRow, match=fault):
        RowReader().read(row)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": turns(*TWO), "prompt": "Hello", "completion": "Ho"}, ("messages", "prompt/completion")),
        ({"problem": "Hello", "solution": "Ho", "messages": turns(*TWO)}, ("messages", "problem/solution")),
        ({"question": "a", "answer": "b", "instruction": "c", "output": "d"}, ("Alpaca", "question/answer")),
        ({"instruction": "a", "input": "b", "output": "c", "response": "d"}, ("Alpaca", "instruction/response")),
        ({"messages": turns(*TWO), "conversations": shared(*FOUR)}, ("messages", "ShareGPT")),
    ],
)
def test_a_row_that_says_two_things_is_refused_with_the_way_out(row, names):
    with pytest.raises(BadRow, match=f"it can be read as {names[0]} and as {names[1]}, which differ") as error:
        RowReader().read(row)
    for columns in str(error.value).split("DataSpec(columns=")[1:]:
        named = ast.literal_eval(columns.partition(")")[0])  # what a user would paste
        assert RowReader(columns=named).read(row)


@pytest.mark.parametrize("write", [json.dumps, str, lambda value: json.dumps(value, indent=2)])
@pytest.mark.parametrize("key", ["prompt", "completion"])
@pytest.mark.parametrize("messages", [turns("Hello"), [{"content": "Hello", "role": "user"}], shared("Hello")])
def test_messages_in_a_text_of_a_pair_are_not_learnt_as_text(write, key, messages):
    row = {"prompt": "Hello", "completion": "Hi"} | {key: write(messages)}
    with pytest.raises(BadRow, match=f"{key} is a text that holds a list of messages"):
        RowReader().read(row)


@pytest.mark.parametrize("text", ["[1, 2]", "[{", '[{"name": "f"}]', "[role] play", '{"role": "user"}', "[]"])
def test_another_text_that_looks_like_code_is_learnt(text):
    assert RowReader().read({"prompt": text, "completion": text}).messages[1].content == text


def test_another_format_that_is_empty_says_nothing():
    row = {"messages": turns(*TWO), "question": None, "answer": "", "prompt": "Hello", "completion": None}
    assert len(RowReader().read(row).messages) == 2
