"""What a message can say besides role and text, and how people spell it."""

import time

import pytest

from common.conversations.conversation import Message
from common.conversations.row_reader import RowReader
from common.sources.source_row import BadRow, Unreadable

ASK, SAY = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
HELLO = (Message("user", "Hello"), Message("assistant", "Hi"))


def read(*turns: dict, key: str = "messages"):
    return RowReader().read({key: list(turns)}).messages


@pytest.mark.parametrize(
    "name", ["assistant", "gpt", "GPT", "chatgpt", "ai", "AI", "bot", "model", "Assistant", " bot "]
)
def test_the_assistant_has_many_names(name):
    assert read(ASK, SAY | {"role": name}) == HELLO


@pytest.mark.parametrize("name", ["user", "User", "human", "Human", "HUMAN"])
def test_the_user_has_many_names(name):
    assert read(ASK | {"role": name}, SAY) == HELLO


@pytest.mark.parametrize("name", ["system", "System", "developer"])
def test_the_system_has_many_names(name):
    assert read({"role": name, "content": "S"}, ASK, SAY)[0] == Message("system", "S")


@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("role", "content"),
        ("Role", "Content"),
        ("from", "value"),
        ("From", " Value"),
        ("from", "content"),
        ("role", "value"),
        ("from", "text"),
        ("role", "text"),
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
def test_keys_of_messages_are_read_as_columns_are(key, role, content):
    assert read({role: "user", content: "Hello"}, {role: "assistant", content: "Hi"}, key=key) == HELLO


@pytest.mark.parametrize("role, content", [("role", "content"), ("from", "value")])
def test_messages_as_columns_of_equal_length_are_those_of_a_list(role, content):
    row = {"conversations": {role: ["user", "assistant"], content: ["Hello", "Hi"]}}
    assert RowReader().read(row).messages == HELLO


@pytest.mark.parametrize("messages", [{}, {"role": "user"}, {"role": ["user"], "content": []}], ids=repr)
def test_another_object_is_no_list_of_messages(messages):
    with pytest.raises(BadRow, match="the messages are not a list"):
        RowReader().read({"messages": messages})


def test_a_list_has_one_way_to_name_roles():
    with pytest.raises(BadRow, match="a message has no role; its keys are 'from', 'value'"):
        read(ASK, {"from": "gpt", "value": "Hi"})


def test_a_role_that_two_keys_could_mean_is_refused():
    with pytest.raises(BadRow, match="2 keys of a message could be 'role'"):
        read(ASK | {"Role": "system"}, SAY)


@pytest.mark.parametrize(
    "pair", [("input", "output"), ("human", "assistant"), ("user", "assistant")], ids=lambda pair: "+".join(pair)
)
def test_objects_with_both_sides_are_two_turns_each(pair):
    turns = [("One?", "1"), ("Two?", "2")]
    rows = [dict(zip(pair, turn, strict=True)) for turn in turns]
    rows[0]["system"] = "S"
    expected = (Message("system", "S"), Message("user", "One?"), Message("assistant", "1"))
    assert read(*rows, key="conversation") == (*expected, Message("user", "Two?"), Message("assistant", "2"))


def test_a_side_that_is_not_to_be_learnt_is_not():
    rows = [{"input": "a", "output": "b", "output_with_loss": False}, {"input": "c", "output": "d"}]
    assert [m.is_trained for m in read(*rows, key="conversation") if m.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Hi"}],
        [{"type": "text", "value": "Hi"}],
        [{"type": "text", "content": "Hi"}],
        [{"type": "text", "text": "Hi", "value": None}],
        [{"type": "output_text", "text": "Hi"}],
        ["Hi"],
        ["H", {"type": "text", "text": "i"}],
    ],
    ids=repr,
)
def test_text_in_parts_is_joined(content):
    assert read(ASK, SAY | {"content": content}) == HELLO


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([{"text": "Hi"}], "the assistant's text is a list, and not of parts with a type"),
        ([3], "the assistant's text is a list, and not of parts with a type"),
        (["Hi", "Go away"], "the assistant's text is a list of 2 texts; join them, or keep the one that is meant"),
        (
            [{"type": "image_url", "image_url": {"url": "a.png"}}],
            "a part of type 'image_url'; only text can be trained",
        ),
        ([{"type": "input_audio"}], "a part of type 'input_audio'"),
        ([{"type": "tool_use", "name": "f"}], "a part of type 'tool_use'"),
        ([{"type": "text", "text": "Hi", "value": "Ho"}], "a part with several texts: text, value"),
        ([{"type": "text", "text": "Hi"}, {"type": "thinking", "thinking": "Hm."}], "thoughts that follow its text"),
        ([{"type": "text", "text": {"a": "Hi"}}], "the assistant's text is not text"),
    ],
    ids=repr,
)
def test_parts_of_another_kind_are_refused(content, fault):
    with pytest.raises(BadRow, match=fault):
        read(ASK, SAY | {"content": content})


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"thinking": "Hm."},
        {"thinking": "Hm.", "reasoning_content": "Hm.", "reasoning": None},
        {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hi"}]},
        {"content": [{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "Hi"}]},
        {"content": [{"type": "reasoning", "value": "Hm."}, "Hi"]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                {"type": "text", "text": "Hi"},
            ]
        },
    ],
    ids=repr,
)
def test_thoughts_in_every_shape_are_the_same(fields):
    assert read(ASK, SAY | fields) == (HELLO[0], Message("assistant", "Hi", reasoning="Hm."))


@pytest.mark.parametrize("thoughts", [None, "", " \n"])
def test_no_thoughts_are_none(thoughts):
    assert read(ASK, SAY | {"reasoning_content": thoughts}) == HELLO


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        (SAY | {"reasoning": "a", "thinking": "b"}, "thoughts are there twice, and differ"),
        (SAY | {"thinking": True}, "thinking is not text"),
        (SAY | {"content": "", "reasoning_content": "a"}, "the assistant's text is empty"),
        (SAY | {"content": None, "reasoning_content": "a"}, "the assistant's text is missing"),
        (
            {"role": "user", "content": [{"type": "thinking", "thinking": "a"}, "b"]},
            "thoughts, which are the assistant's",
        ),
    ],
)
def test_thoughts_that_cannot_be_read_are_refused(turn, fault):
    with pytest.raises(BadRow, match=fault):
        read(ASK, turn, SAY)


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio", "audios", "video", "image_path", "audio_url"])
@pytest.mark.parametrize("place", ["row", "user", "assistant"])
def test_media_are_refused_where_there_are_any(name, place):
    turns = [ASK | {name: ["a"]} if place == "user" else ASK, SAY | {name: ["a"]} if place == "assistant" else SAY]
    with pytest.raises(BadRow, match=f"it has {name}; only text can be trained"):
        RowReader().read({"messages": turns} | ({name: ["a"]} if place == "row" else {}))


@pytest.mark.parametrize("nothing", [None, [], "", {}], ids=repr)
def test_media_that_are_none_are_nothing(nothing):
    row = {"messages": [ASK | {"images": nothing}, SAY | {"audio": nothing}], "images": nothing}
    assert RowReader().read(row).messages == HELLO


def unread(*rows: dict) -> dict[str, int]:
    reader = RowReader()
    for row in rows:
        reader.read(row)
    return dict(reader.unread)


def test_every_key_and_field_that_is_not_used_is_counted_by_rows():
    turns = [ASK | {"name": "Ann", "id": 1}, SAY | {"name": "Bob", "refusal": None, "metadata": {}}]
    rows = [{"messages": turns, "id": "x", "Source": "y", "note": " "}, {"messages": [ASK, SAY], "id": 0, "ok": False}]
    assert unread(*rows) == {"messages[].name": 1, "messages[].id": 1, "id": 2, "Source": 1, "ok": 1}


def test_fields_of_parts_and_of_other_roles_are_counted():
    parts = [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]
    turns = [ASK | {"content": parts, "reasoning": "why"}, SAY | {"tool_call_id": "c1"}]
    names = {"messages[].content[].cache_control", "messages[].reasoning", "messages[].tool_call_id"}
    assert set(unread({"messages": turns})) == names


def test_what_a_refused_row_does_not_use_is_not_counted():
    reader = RowReader()
    with pytest.raises(BadRow):
        reader.read({"messages": [ASK], "id": 1})
    assert not reader.unread


NAN = Unreadable("NaN and Infinity are not JSON; write null")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": NAN},
        {"messages": [ASK | {"role": NAN}, SAY]},
        {"messages": [ASK, SAY | {"content": NAN}]},
        {"messages": [ASK, SAY | {"content": [{"type": "text", "text": NAN}]}]},
        {"messages": [ASK, SAY | {"reasoning": NAN}]},
        {"messages": [ASK, SAY | {"weight": NAN}]},
        {"messages": [ASK, SAY | {"tool_calls": [{"name": "f", "arguments": {"a": [NAN]}}]}]},
        {"messages": [ASK, SAY], "tools": [{"name": "f", "parameters": {"a": NAN}}]},
        {"messages": [ASK, SAY], "chat_template_kwargs": {"budget": NAN}},
        {"messages": [ASK, SAY], "system": NAN},
        {"prompt": "a", "completion": NAN},
        {"query": "a", "response": "b", "history": [["c", NAN]]},
        {"text": NAN},
    ],
    ids=repr,
)
def test_a_value_that_nobody_can_read_is_a_fault_where_it_is_used(row):
    with pytest.raises(BadRow, match="NaN and Infinity are not JSON"):
        RowReader().read(row)


def test_a_value_that_nobody_can_read_is_a_column_like_any_other_where_it_is_not_used():
    assert unread({"messages": [ASK | {"score": NAN}, SAY], "score": NAN}) == {"messages[].score": 1, "score": 1}


@pytest.mark.slow
def test_reading_plain_messages_takes_microseconds():
    # 20,000 messages within 0.4 s are 20 us each: several times what they take
    reader, row = RowReader(), {"messages": [ASK, SAY] * 10}
    started = time.process_time()
    for _ in range(1000):
        reader.read(row)
    assert time.process_time() - started < 0.4
