import pytest

from common.data.conversation import Conversation, Message
from common.data.conversations import RowReader
from common.data.source_row import BadRow

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
        ({"question": "a", "answer": "b"}, "no format has these keys"),
        ({"messages": []}, "missing or empty"),
        ({"messages": "Hello"}, "the messages are text, invalid JSON"),
        ({"messages": "[]"}, "missing or empty"),
        ({"messages": " "}, "missing or empty"),
        ({"messages": "3"}, "the messages are not a list"),
        ({"conversations": '[{"from": "human"}'}, "the messages are text, invalid JSON"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "prompt is a list, and not of parts"),
        ({"prompt": "a", "Prompt": "b", "completion": "c"}, "2 keys could be 'prompt'"),
        ({"messages": ["Hello"]}, "a message is not an object"),
        (messages(("user", "a")), "the last turn is not the assistant's"),
        (messages(("system", "a")), "the last turn is not the assistant's"),
        (messages(("assistant", "a")), "a turn of the assistant where the user's should be"),
        (messages(("user", "a"), ("user", "b")), "a turn of the user where the assistant's should be"),
        (messages(("user", "a"), ("system", "b"), ("assistant", "c")), "a turn of the system"),
        (messages(("tool", "a"), ("assistant", "b")), "role 'tool' is not system, user or assistant"),
        (messages((None, "a"), ("assistant", "b")), "role None is not"),
        (messages(("user", None), ("assistant", "b")), "the user's text is missing"),
        (messages(("user", 7), ("assistant", "b")), "the user's text is not text"),
        (messages(("user", "a"), ("assistant", "  ")), "the assistant's text is empty"),
        (messages(("user", "\ud800"), ("assistant", "b")), "lone surrogate"),
        ({"prompt": "a", "completion": None}, "completion is missing"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input is not text"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_a_row_that_cannot_be_learnt_from_says_why(row, fault):
    with pytest.raises(BadRow) as error:
        example(row)
    assert fault in str(error.value)


def test_a_file_has_one_format():
    with pytest.raises(BadRow, match="the format is text, not messages as above it"):
        RowReader("messages").read({"text": "a"})
