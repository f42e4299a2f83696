import pytest

from common.conversations.conversation import Conversation, Message
from common.conversations.row_reader import RowReader
from common.sources.source_row import BadRow

HELLO = Conversation((Message("user", "Hello"), Message("assistant", "Hi")))


def example(row: dict):
    return RowReader().read(row)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, "ShareGPT"),
        ({"conversations": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}, "ShareGPT"),
        ({"prompt": "Hello", "completion": "Hi"}, "prompt/completion"),
        (
            {
                "prompt": [{"role": "user", "content": "Hello"}],
                "completion": [{"role": "assistant", "content": "Hi"}],
            },
            "prompt/completion",
        ),
        ({"instruction": "Hello", "output": "Hi"}, "Alpaca"),
        ({"instruction": "Hello", "input": "", "output": "Hi", "id": 7}, "Alpaca"),
        ({"instruction": "Hello", "input": " \n", "output": "Hi"}, "Alpaca"),
        ({"instruction": "Hello", "input": "\u200b", "output": "Hi"}, "Alpaca"),
        ({"instruction": "Hello", "input": None, "output": "Hi"}, "Alpaca"),
        ({" Prompt": "Hello", "\ufeffCompletion": "Hi", "id": 7}, "prompt/completion"),
        ({"messages": '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]'}, "messages"),
        ({"conversations": '[{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]'}, "ShareGPT"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Hi", "image_url": None}]},
                ]
            },
            "messages",
        ),
    ],
)
def test_every_format_gives_the_same_conversation(row, name):
    reader = RowReader()
    assert reader.read(row) == HELLO
    assert reader.format_name == name


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Translate", "input": "chien", "output": "dog"}
    assert example(row).messages[0].content == "Translate\n\nchien"


def test_names_as_they_stand_come_before_names_in_another_case():
    assert example({"Messages": [], "text": "Once"}) == "Once"


@pytest.mark.parametrize("text", ["👍🏽", "a\u200bb", "\u200bא\u200f", "ก็", ".", "\0a"])
def test_text_with_anything_to_see_is_taken_as_it_is(text):
    assert example({"text": text}) == text


def test_plain_text_stays_text():
    assert example({"text": "Once upon a time"}) == "Once upon a time"


def messages(*pairs: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"body": "a", "reply": "b"}, "no format has these keys: 'body', 'reply'; a row needs messages, prompt"),
        ({}, "no format has these keys: none; a row needs"),
        ({"messages": []}, "missing or empty"),
        ({"messages": "Hello"}, "the messages are text, invalid JSON"),
        ({"messages": "[]"}, "missing or empty"),
        ({"messages": " "}, "missing or empty"),
        ({"messages": "3"}, "the messages are not a list"),
        ({"conversations": '[{"from": "human"}'}, "the messages are text, invalid JSON"),
        ({"prompt": "a", "Prompt": "b", "completion": "c"}, "2 keys could be 'prompt'"),
        ({"messages": ["Hello"]}, "a message is not an object"),
        (messages(("user", "a")), "it has no turn of the assistant to learn"),
        (messages(("system", "a")), "it has no turn of the assistant to learn"),
        (messages(("tool", "a")), "it has no turn of the assistant to learn"),
        (messages(("bard", "a"), ("assistant", "b")), "role 'bard' is none of system, developer, user, human"),
        (messages((None, "a"), ("assistant", "b")), "a message has no role"),
        (messages((["user"], "a"), ("assistant", "b")), "role ['user'] is none of"),
        ({"messages": [{"speaker": "user", "text": "a"}]}, "a message has no role; its keys are 'speaker', 'text'"),
        (messages(("user", None), ("assistant", "b")), "the user's text is missing"),
        (messages(("user", 7), ("assistant", "b")), "the user's text is not text"),
        (messages(("user", ""), ("assistant", "b")), "the user's text is empty"),
        (messages(("user", "a"), ("assistant", "  ")), "the assistant's text is empty"),
        (messages(("user", "a"), ("assistant", None)), "the assistant's text is missing"),
        (messages(("system", None), ("assistant", "b")), "the system's text is missing"),
        (messages(("user", "\ud800"), ("assistant", "b")), "lone surrogate"),
        (messages(("system", "\ud800"), ("assistant", "b")), "lone surrogate"),
        ({"prompt": "a", "completion": None}, "completion is missing"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": ""}, "completion is empty"),
        (
            {"prompt": [{"role": "assistant", "content": "a"}], "completion": [{"role": "user", "content": "b"}]},
            "it has no turn of the assistant to learn",
        ),
        ({"instruction": "a", "input": 3, "output": "b"}, "input is not text"),
        ({"instruction": "", "input": " ", "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "it has both input and context"),
        ({"text": ""}, "text is empty"),
        ({"text": "Hello", "role": "prompter", "parent_id": None}, "the row is one message, a text with a role"),
        ({"text": "A cat.", "image": "cat.png"}, "it has image; only text can be trained"),
    ],
)
def test_a_row_that_cannot_be_learnt_from_says_why(row, fault):
    with pytest.raises(BadRow) as error:
        example(row)
    assert fault in str(error.value)


def test_a_file_has_one_format():
    with pytest.raises(BadRow, match="the format is text, not messages as above it"):
        RowReader("messages").read({"text": "a"})


def test_the_first_good_row_decides_the_format():
    reader = RowReader()
    with pytest.raises(BadRow):
        reader.read({"text": ""})
    assert reader.read({"prompt": "Hello", "completion": "Hi"}) == HELLO


@pytest.mark.parametrize(
    "turns",
    [
        ("assistant", "user", "assistant"),
        ("user", "assistant", "user"),
        ("user", "user", "assistant", "assistant"),
        ("user", "system", "assistant"),
        ("system", "system", "user", "assistant"),
        ("system", "assistant"),
        ("assistant",),
        ("user", "tool", "assistant"),
    ],
    ids=" ".join,
)
def test_turns_are_passed_on_in_any_order(turns):
    read = example(messages(*((role, f"{role} {n}") for n, role in enumerate(turns))))
    assert [(m.role, m.content) for m in read.messages] == [(role, f"{role} {n}") for n, role in enumerate(turns)]


def test_a_system_message_may_be_empty():
    assert example(messages(("system", ""), ("user", "a"), ("assistant", "b"))).messages[0] == Message("system", "")


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"instruction": "Hello", "output": "Hi", "system": "Be brief."}, "Be brief."),
        ({"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}], "system": "S"}, "S"),
        (messages(("user", "Hello"), ("assistant", "Hi")) | {"system": "Be brief."}, "Be brief."),
        (messages(("system", ""), ("user", "Hello"), ("assistant", "Hi")) | {"system": "S"}, "S"),
        (messages(("system", "S"), ("user", "Hello"), ("assistant", "Hi")) | {"system": " S\n"}, " S\n"),
        ({"prompt": "Hello", "completion": "Hi", "System": "S"}, "S"),
        ({"prompt": [{"role": "user", "content": "Hello"}], "completion": "Hi", "system": "S"}, "S"),
        ({"system_prompt": "S", "question": "Hello", "response": "Hi"}, "S"),
        ({"system_prompt": "S", "system": "S", "question": "Hello", "response": "Hi"}, "S"),
    ],
)
def test_a_system_message_beside_the_turns_comes_first(row, system):
    assert example(row) == Conversation((Message("system", system), *HELLO.messages))


@pytest.mark.parametrize("system", ["", None, " \n"])
def test_a_system_column_that_is_empty_says_nothing(system):
    assert example({"instruction": "Hello", "output": "Hi", "system": system}) == HELLO


@pytest.mark.parametrize(
    "row",
    [
        messages(("system", "A"), ("user", "Hello"), ("assistant", "Hi")) | {"system": "B"},
        {"system_prompt": "A", "system": "B", "question": "Hello", "response": "Hi"},
    ],
)
def test_two_system_messages_that_differ_are_refused(row):
    with pytest.raises(BadRow, match="two system messages that differ"):
        example(row)


@pytest.mark.parametrize("history", [[["One?", "1"], ["Two?", "2"]], '[["One?", "1"], ["Two?", "2"]]'], ids=type)
@pytest.mark.parametrize("keys", [("instruction", "output"), ("query", "response")], ids=" ".join)
def test_history_is_the_turns_before_and_its_answers_are_learnt(history, keys):
    row = dict(zip(keys, ("Three?", "3"), strict=True)) | {"history": history, "system": "Count."}
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    expected = [("system", "Count."), *turns, ("user", "Three?"), ("assistant", "3")]
    assert example(row).messages == tuple(Message(role, text) for role, text in expected)


@pytest.mark.parametrize("history", [None, [], "", "[]"])
def test_a_history_that_is_empty_says_nothing(history):
    assert example({"instruction": "Hello", "output": "Hi", "history": history}).messages == HELLO.messages


@pytest.mark.parametrize("history", [[["One?"]], ["One?", "1"], {"One?": "1"}, [["One?", "1", "x"]], 3])
def test_a_history_of_another_shape_is_refused(history):
    with pytest.raises(BadRow, match="the history is not a list of pairs"):
        example({"instruction": "Hello", "output": "Hi", "history": history})


PROMPT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
]


@pytest.mark.parametrize("completion", ["2", [{"role": "assistant", "content": "2"}]], ids=type)
def test_of_a_prompt_and_its_completion_only_the_completion_is_learnt(completion):
    read = example({"prompt": PROMPT, "completion": completion}).messages
    assert [(m.content, m.is_trained) for m in read if m.role == "assistant"] == [("1", False), ("2", True)]


def test_a_completion_of_several_turns_is_learnt_whole():
    turns = [("assistant", "2"), ("user", "Three?"), ("assistant", "3")]
    completion = [{"role": role, "content": text} for role, text in turns]
    read = example({"prompt": PROMPT, "completion": completion}).messages
    assert [m.is_trained for m in read if m.role == "assistant"] == [False, True, True]


def test_thoughts_beside_an_answer_are_its_reasoning():
    (_, answer) = example({"question": "1+1?", "thinking": "Add.", "answer": "2"}).messages
    assert answer == Message("assistant", "2", reasoning="Add.")


def test_template_arguments_are_handed_on():
    row = messages(("user", "Hello"), ("assistant", "Hi"))
    row |= {"chat_template_kwargs": {"enable_thinking": False, "note": "a", "budget": 3, "absent": None, "tools_": []}}
    expected = {"enable_thinking": False, "note": "a", "budget": 3}
    assert example(row).template_arguments == expected
    assert example(row | {"chat_template_kwargs": '{"enable_thinking": false}'}).template_arguments == {
        "enable_thinking": False
    }


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["enable_thinking"], "chat_template_kwargs are not a JSON object"),
        ({"style": {"a": 1}}, "chat_template_kwargs has 'style', which is not a text"),
        ({"messages": "x"}, "chat_template_kwargs cannot set 'messages'"),
        ({"add_generation_prompt": True}, "chat_template_kwargs cannot set 'add_generation_prompt'"),
    ],
)
def test_template_arguments_of_another_kind_are_refused(arguments, fault):
    with pytest.raises(BadRow, match=fault):
        example(messages(("user", "Hello"), ("assistant", "Hi")) | {"chat_template_kwargs": arguments})
