"""The token ids of a Mistral conversation are those of mistral-common, with which these models are trained and served.

With this project's own templates, which hold a system message and tools; see tests/mistral_oracle.py.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from common.conversations.conversation import Conversation, Message, ToolCall
from common.tokens.chat_format import ChatFormat
from common.tokens.turns import WRITTEN_LATER
from tests.mistral_oracle import mistral_ids
from tests.real_tokenizers import real_tokenizer
from tests.tokens.test_real_templates import ANSWERS, OURS, chat, check

MODELS = {"mistral_v3": OURS["mistral_v3"], "tekken": OURS["mistral_tekken"]}
QUESTION = Message("user", "How warm is it in Ulm?")
SAYS = Message("assistant", "12 degrees.")
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", {"town": "Ulm", "days": 2}, "call00001"),))
TWO_CALLS = Message(
    "assistant",
    "",
    tool_calls=(ToolCall("weather", {"town": "Ulm"}, "call00001"), ToolCall("weather", {"town": "Łódź"}, "call00002")),
)
RESULT = Message("tool", '{"degrees": 12}', name="weather", tool_call_id="call00001")
SECOND_RESULT = Message("tool", "rain & wind", name="weather", tool_call_id="call00002")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town's next days",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
SYSTEM = Message("system", "Be brief.")
CONVERSATIONS = {
    **{f"answer {answer!a}": chat(answer) for answer in ANSWERS if answer == answer.rstrip(" ")},
    **{f"question {text!a}": chat("Yes.", question=text) for text in ANSWERS},
    "system": chat("So be it.", system="Be brief.\n\nAlways."),
    "several turns": chat("One.", "2", '"Three"', "四"),
    "several turns with a system message": chat("One.", "2", "四", system="Be brief."),
    "two of the user's in a row": Conversation((QUESTION, QUESTION, SAYS)),
    "tools that nobody calls": Conversation((QUESTION, SAYS), tools=(WEATHER,)),
    "call": Conversation((QUESTION, CALL), tools=(WEATHER,)),
    "call and result": Conversation((QUESTION, CALL, RESULT, SAYS), tools=(WEATHER,)),
    "two calls": Conversation((QUESTION, TWO_CALLS, RESULT, SECOND_RESULT, SAYS), tools=(WEATHER,)),
    **{
        f"result {result!a}": Conversation((QUESTION, CALL, replace(RESULT, content=result), SAYS), tools=(WEATHER,))
        for result in (
            '["a", {"b": 2}]',
            "12",
            "-1.5",
            "true",
            "null",
            "warm",
            "so: {}",
            "{",
            "1.2.3",
        )
    },
    "call before the last turn": Conversation(
        (SYSTEM, QUESTION, SAYS, QUESTION, CALL, RESULT, SAYS, QUESTION, SAYS), tools=(WEATHER,)
    ),
    "call in the last of several turns": Conversation(
        (SYSTEM, QUESTION, SAYS, QUESTION, CALL, RESULT, SAYS), tools=(WEATHER, WEATHER)
    ),
}


def request(conversation: Conversation) -> dict[str, Any]:
    """The conversation as OpenAI writes it."""
    messages = []
    for message in conversation.messages:
        told: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            told["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        if message.reasoning:
            told["reasoning_content"] = told["thinking"] = message.reasoning
        if message.role == "tool":
            told |= {"name": message.name, "tool_call_id": message.tool_call_id}
        messages.append(told)
    return {"messages": messages} | ({"tools": list(conversation.tools)} if conversation.tools else {})


@cache
def oracle(name: str) -> dict[str, list[int] | str]:
    answers = mistral_ids(name, [request(conversation) for conversation in CONVERSATIONS.values()])
    return dict(zip(CONVERSATIONS, answers, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_ids_of_a_conversation_are_mistral_commons(name, conversation):
    made_by = ChatFormat(real_tokenizer(name, MODELS[name]))
    assert made_by.encode(CONVERSATIONS[conversation]).input_ids == oracle(name)[conversation]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("conversation", [each for each in CONVERSATIONS if CONVERSATIONS[each].tools])
def test_calls_and_the_answers_after_their_results_are_trained(name, conversation):
    check(ChatFormat(real_tokenizer(name, MODELS[name])), CONVERSATIONS[conversation])


@pytest.mark.parametrize("name", ["mistral_v1", *MODELS])
def test_mistral_common_and_the_tokenizer_of_tests_have_the_same_vocabulary(name):
    tokenizer = real_tokenizer(name)
    for answer, ids in zip(
        ANSWERS, mistral_ids(name, [request(chat("a", question=text)) for text in ANSWERS]), strict=True
    ):
        space, end = ("" if name == "tekken" else " "), ("[/INST]" if name != "mistral_v1" else " [/INST]")
        text = f"<s>[INST]{space}{answer}{end}{space}a</s>"
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("conversation", "is_said"),
    [
        (Conversation((SYSTEM, QUESTION, SAYS)), False),
        (Conversation((SYSTEM, QUESTION, SAYS, QUESTION, SAYS)), True),
        (Conversation((QUESTION, SAYS, SYSTEM, QUESTION, SAYS)), False),
        (Conversation((QUESTION, CALL, RESULT, SAYS), (WEATHER,)), False),
        (Conversation((QUESTION, CALL, RESULT, SAYS, QUESTION, SAYS), (WEATHER,)), True),
        (Conversation((SYSTEM, QUESTION, replace(SAYS, is_trained=False), QUESTION, SAYS)), False),
    ],
)
def test_earlier_answers_that_are_trained_without_system_message_or_tools_are_said(name, conversation, is_said):
    tokens = ChatFormat(real_tokenizer(name, MODELS[name])).encode(conversation)
    assert tokens.notes == ((WRITTEN_LATER,) if is_said else ())
