"""Our template for Qwen3 writes tools, calls and results as Qwen3's own does; only its empty think blocks stay."""

import json

import pytest

from common.conversations.conversation import Conversation, Message, ToolCall
from common.tokens.chat_format import ChatFormat
from tests.real_tokenizers import TRL_TEMPLATES, real_tokenizer
from tests.tokens.test_real_templates import OURS, check

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town's <next> days",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {}}}
SYSTEM, QUESTION, ANSWER = Message("system", "Be brief."), Message("user", "Rain?"), Message("assistant", "No rain.")
ULM = ToolCall("weather", {"town": "Ulm", "days": [1, None, True]}, "a")
LODZ = ToolCall("weather", {"town": "Łódź & «more»"}, "b")
CALL, BOTH = Message("assistant", "", tool_calls=(ULM,)), Message("assistant", "", tool_calls=(ULM, LODZ))
SAYS_TOO = Message("assistant", "I look it up.", tool_calls=(LODZ,))
DRY, WET = Message("tool", "dry", tool_call_id="a"), Message("tool", '{"rain": "5 mm"}', tool_call_id="b")
THOUGHT = Message("assistant", "", "They ask for Ulm.", (ULM,))
CONVERSATIONS = {
    "tools that nobody calls": Conversation((QUESTION, ANSWER), (WEATHER,)),
    "with a system message": Conversation((SYSTEM, QUESTION, CALL, DRY, ANSWER), (WEATHER, TIME)),
    "call": Conversation((QUESTION, CALL), (WEATHER,)),
    "call without definitions": Conversation((QUESTION, CALL, DRY, ANSWER)),
    "call and result": Conversation((QUESTION, CALL, DRY, ANSWER), (WEATHER,)),
    "two calls": Conversation((QUESTION, BOTH, DRY, WET, ANSWER), (WEATHER,)),
    "text beside a call": Conversation((QUESTION, SAYS_TOO, WET, ANSWER), (WEATHER,)),
    "one call after another": Conversation((QUESTION, CALL, DRY, SAYS_TOO, WET, ANSWER), (WEATHER,)),
    "calls in two turns": Conversation((QUESTION, CALL, DRY, ANSWER, QUESTION, BOTH, DRY, WET, ANSWER), (WEATHER,)),
    "thoughts before a call": Conversation((QUESTION, THOUGHT, DRY, ANSWER), (WEATHER,)),
}
NO_THOUGHTS = "<think>\n\n</think>\n\n"


def ours_and_own() -> tuple[ChatFormat, ChatFormat]:
    return tuple(ChatFormat(real_tokenizer("qwen3", text)) for text in (OURS["qwen3"], TRL_TEMPLATES["qwen3"]))


def without_empty_blocks(chat_format: ChatFormat, ids: list[int]) -> list[int]:
    block, left = chat_format.tokenizer(NO_THOUGHTS, add_special_tokens=False)["input_ids"], list[int]()
    for index in ids:
        left.append(index)
        if left[-len(block) :] == block:
            del left[-len(block) :]
    return left


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_ids_are_those_of_qwens_own_template_but_for_empty_think_blocks(name):
    ids = [without_empty_blocks(made_by, made_by.encode(CONVERSATIONS[name]).input_ids) for made_by in ours_and_own()]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_call_is_trained_behind_the_prompt_that_asks_for_it(name):
    ours, _ = ours_and_own()
    check(ours, CONVERSATIONS[name])
    answers = [message for message in CONVERSATIONS[name].messages if message.role == "assistant"]
    assert len(ours.encode(CONVERSATIONS[name]).turn_ends) == len(answers)


def test_results_are_not_trained_and_calls_are():
    ours, _ = ours_and_own()
    tokens = ours.encode(CONVERSATIONS["two calls"])
    trained = ours.tokenizer.decode([label for label in tokens.labels if label != -100])
    assert [json.loads(line) for line in trained.splitlines() if line.startswith("{")] == [
        {"name": call.name, "arguments": call.arguments} for call in (ULM, LODZ)
    ]
    assert trained.endswith("</tool_call><|im_end|>No rain.<|im_end|>") and "dry" not in trained
