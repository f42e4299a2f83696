"""Tools and their calls, in the shapes of OpenAI, LLaMA-Factory, ms-swift and others, are read as one."""

import json

import pytest

from common.conversations.conversation import Message, ToolCall
from common.conversations.row_reader import RowReader
from common.sources.source_row import BadRow

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Looks at the sky.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
ASK = {"role": "user", "content": "Rain in Bonn?"}
SAY = {"role": "assistant", "content": "No."}
ARGUMENTS = {"city": "Bonn", "days": 2}
CALL = ToolCall("weather", ARGUMENTS)


def read(row: dict):
    return RowReader().read(row)


def chat(*turns: dict, **more: object) -> dict:
    return {"messages": [ASK, *turns, SAY], **more}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [FUNCTION],
        [{"type": "function", **FUNCTION}],
        [json.dumps(FUNCTION)],
        json.dumps([TOOL]),
        json.dumps([FUNCTION], indent=2),
    ],
    ids=["wrapped", "plain", "flat", "texts", "JSON", "JSON of plain ones"],
)
@pytest.mark.parametrize("key", ["tools", "functions", "Tools"])
def test_tools_in_every_shape_are_the_same(tools, key):
    assert read(chat(**{key: tools})).tools == (TOOL,)


def test_tools_are_read_beside_every_format():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for row in ({"conversations": turns}, {"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}):
        assert read(row | {"tools": [TOOL]}).tools == (TOOL,)


def test_tools_of_a_system_message_are_those_of_the_conversation():
    system = {"role": "system", "content": "Be brief.", "tools": json.dumps([FUNCTION])}
    assert read({"messages": [system, ASK, SAY]}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"], ids=repr)
def test_no_tools_are_none(tools):
    assert read(chat(tools=tools)).tools == ()


def test_the_nulls_of_a_table_are_no_part_of_a_schema():
    schema = {"type": "object", "properties": {"city": {"type": "string", "default": None, "enum": None}, "zip": None}}
    (tool,) = read(
        chat(tools=[{"type": "function", "function": FUNCTION | {"parameters": schema, "strict": None}}])
    ).tools
    properties = tool["function"]["parameters"]["properties"]
    assert "strict" not in tool["function"] and "zip" not in properties
    assert properties["city"] == {"type": "string", "default": None, "enum": None}


@pytest.mark.parametrize(
    ("tools", "fault"),
    [
        ("weather", "the tools are text, invalid JSON"),
        ({"name": "weather"}, "the tools are not a list"),
        ([3], "a tool is not an object"),
        ([{"description": "a"}], "a tool has no name"),
        ([{"type": "function", "function": "weather"}], "a tool has no name"),
        ([{"type": "code_interpreter"}], "a tool is of type 'code_interpreter'"),
    ],
)
def test_tools_of_another_shape_are_refused(tools, fault):
    with pytest.raises(BadRow, match=fault):
        read(chat(tools=tools))


def test_tools_that_are_there_twice_and_differ_are_refused():
    with pytest.raises(BadRow, match="tools are there twice, and differ"):
        read(chat(tools=[TOOL], functions=[FUNCTION | {"name": "sky"}]))


def called(**fields: object) -> dict:
    return {"role": "assistant", "content": None, **fields}


@pytest.mark.parametrize(
    "turn",
    [
        called(tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}]),
        called(tool_calls=[{"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}]),
        called(tool_calls=[{"name": "weather", "arguments": ARGUMENTS}]),
        called(tool_calls=[{"name": "weather", "arguments": json.dumps(ARGUMENTS), "function": None}]),
        called(tool_calls=json.dumps([{"name": "weather", "arguments": ARGUMENTS}])),
        called(tool_calls={"name": "weather", "arguments": ARGUMENTS}),
        called(function_call={"name": "weather", "arguments": json.dumps(ARGUMENTS)}),
        called(function_call={"name": "weather", "arguments": ARGUMENTS}, tool_calls=[]),
        called(function_call={"name": None}, tool_calls=[{"name": "weather", "arguments": ARGUMENTS}]),
        called(content="", tool_calls=[{"name": "weather", "arguments": ARGUMENTS}]),
        called(content=[], tool_calls=[{"name": "weather", "arguments": ARGUMENTS}]),
        {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]},
        {"role": "function_call", "content": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
        {"role": "function_call", "content": {"name": "weather", "arguments": ARGUMENTS}},
        {"role": "tool_call", "content": json.dumps([{"name": "weather", "arguments": json.dumps(ARGUMENTS)}])},
    ],
)
def test_a_call_in_every_shape_is_the_same(turn):
    assert read(chat(turn)).messages[1] == Message("assistant", "", tool_calls=(CALL,))


def test_parallel_calls_keep_their_order_and_ids():
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": f"f{n}", "arguments": "{}"}} for n in (1, 2)]
    assert read(chat(called(tool_calls=calls))).messages[1].tool_calls == (
        ToolCall("f1", {}, "c1"),
        ToolCall("f2", {}, "c2"),
    )


def test_a_call_beside_a_text_keeps_both():
    turn = called(content="Let me look.", tool_calls=[{"name": "weather", "arguments": ARGUMENTS}])
    assert read(chat(turn)).messages[1] == Message("assistant", "Let me look.", tool_calls=(CALL,))


@pytest.mark.parametrize("arguments", [{}, "{}", None], ids=repr)
def test_a_call_may_be_without_arguments(arguments):
    turn = called(tool_calls=[{"name": "now", "arguments": arguments}])
    assert read(chat(turn)).messages[1].tool_calls == (ToolCall("now", {}),)


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython", "tool_response", "Tool"])
def test_a_result_is_the_tools_whatever_its_role_is_called(role):
    assert read(chat({"role": role, "content": "dry"})).messages[1] == Message("tool", "dry")


def test_a_result_keeps_its_name_and_the_id_of_its_call():
    turn = {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": [{"type": "text", "text": "dry"}]}
    assert read(chat(turn)).messages[1] == Message("tool", "dry", name="weather", tool_call_id="c1")


def test_a_result_may_be_empty():
    assert read(chat({"role": "tool", "content": ""})).messages[1] == Message("tool", "")


def test_sharegpt_with_calls_as_llama_factory_has_it():
    turns = [
        ("human", "Rain in Bonn?"),
        ("function_call", json.dumps({"name": "weather", "arguments": ARGUMENTS})),
        ("observation", '{"sky": "dry"}'),
        ("gpt", "No."),
    ]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": json.dumps([FUNCTION])}
    read_row = read(row)
    assert read_row.tools == (TOOL,)
    assert read_row.messages == (
        Message("user", "Rain in Bonn?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", '{"sky": "dry"}'),
        Message("assistant", "No."),
    )


def call_turn(name: str, role: str = "function_call", **more: object) -> dict:
    return {"role": role, "content": json.dumps({"name": name, "arguments": {}}), **more}


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_calls_in_a_row_are_parallel_calls_of_one_turn(role):
    results = [{"role": "tool", "content": text} for text in ("1", "2")]
    messages = read(chat(call_turn("f", role), call_turn("g", role), *results, call_turn("h", role))).messages
    assert [[call.name for call in message.tool_calls] for message in messages] == [[], ["f", "g"], [], [], ["h"], []]


def test_a_call_goes_on_with_the_text_before_it():
    assert read(chat(called(content="Let me look."), call_turn("f"))).messages[1] == Message(
        "assistant", "Let me look.", tool_calls=(ToolCall("f", {}),)
    )


def test_calls_with_a_result_between_them_are_turns_of_their_own():
    messages = read(chat(call_turn("f"), {"role": "tool", "content": "1"}, call_turn("g"))).messages
    assert [len(message.tool_calls) for message in messages] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("more", [{"weight": 0}, {"reasoning_content": "Hm."}], ids=["flag", "thoughts"])
def test_calls_in_a_row_that_cannot_be_one_turn_are_refused(more):
    with pytest.raises(BadRow, match="a call that goes on with the assistant's turn has thoughts or a flag of its own"):
        read(chat(call_turn("f"), call_turn("g", **more)))


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        (called(tool_calls=[{"name": "f", "arguments": "x"}]), "the arguments of 'f' are text, invalid JSON"),
        (called(tool_calls=[{"name": "f", "arguments": ""}]), "the arguments of 'f' are not a JSON object"),
        (called(tool_calls=[{"name": "f", "arguments": "[1]"}]), "the arguments of 'f' are not a JSON object"),
        (called(tool_calls=[{"name": "f", "arguments": [1]}]), "the arguments of 'f' are not a JSON object"),
        (called(tool_calls=[{"name": "f", "arguments": 3}]), "the arguments of 'f' are not a JSON object"),
        (called(tool_calls=[{"name": "f", "arguments": {"a": {"b": None}}}]), "the arguments of 'f' hold null"),
        (
            called(tool_calls=[{"name": "f", "arguments": json.dumps(json.dumps(ARGUMENTS))}]),
            "the arguments of 'f' are not a JSON object, but JSON text that holds JSON text: encode them once",
        ),
        (called(tool_calls=[{"arguments": {}}]), "a tool call has no name of a function"),
        (called(tool_calls=[{"type": "retrieval"}]), "a tool call is of type 'retrieval'"),
        (called(tool_calls=["f"]), "the tool calls are text, invalid JSON"),
        (called(tool_calls=[3]), "a tool call is not an object"),
        (called(tool_calls=[{"name": "f", "id": 3}]), "the id of a tool call is not text"),
        (called(tool_calls=[{"name": "f"}], function_call={"name": "g"}), "tool_calls and another function_call"),
        (called(tool_calls=[]), "the assistant's text is missing"),
        ({"role": "function_call", "content": None}, "a turn that calls a tool names none"),
        ({"role": "function_call", "content": "weather()"}, "the tool calls are text, invalid JSON"),
        ({"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, "a turn of the user has tool calls"),
        ({"role": "tool", "content": None}, "the tool's text is missing"),
        ({"role": "tool", "content": {"sky": "dry"}}, "the tool's text is not text"),
    ],
)
def test_a_turn_of_another_shape_is_refused_by_name(turn, fault):
    with pytest.raises(BadRow, match=fault):
        read(chat(turn))


def test_a_null_in_arguments_as_json_text_is_a_null():
    turn = called(tool_calls=[{"name": "f", "arguments": '{"a": null}'}])
    assert read(chat(turn)).messages[1].tool_calls == (ToolCall("f", {"a": None}),)
