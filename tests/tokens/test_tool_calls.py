"""Calls of tools, their results and the tools' definitions, in the words of each model's own template."""

import json

import pytest

from common.conversations.conversation import Conversation, Message, ToolCall
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat
from tests.tokens.test_chat_format import TEMPLATES, llama3, make_tokenizer, qwen
from tests.tokens.test_training_spans import ASKING, chatml, text_of

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
    },
}
PARIS = ToolCall("get_weather", {"city": "Paris"}, "call_7")
OSLO = ToolCall("get_weather", {"city": "Oslo"}, "call_8")
QUESTION, ANSWER = Message("user", "Rain?"), Message("assistant", "No rain")
RESULT = Message("tool", "dry", name="get_weather", tool_call_id="call_7")
CALLED = (QUESTION, Message("assistant", "", tool_calls=(PARIS,)), RESULT, ANSWER)
# Calls in a JSON list behind a control token, results with the id of their call, which must have nine characters.
MISTRAL = """{{- bos_token -}}
{%- if tools -%}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + '[/INST]' -}}
{%- elif m.role == 'tool' -%}
{{- '[TOOL_RESULTS]{"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- elif m.tool_calls -%}
{{- '[TOOL_CALLS][' -}}
{%- for call in m.tool_calls -%}
{%- if not call.id or call.id | length != 9 -%}{{- raise_exception('ids need nine characters') -}}{%- endif -%}
{{- call.function | tojson + call.id + (', ' if not loop.last else '') -}}
{%- endfor -%}
{{- ']' + eos_token -}}
{%- else -%}{{- ' ' + m.content + eos_token -}}
{%- endif -%}
{%- endfor -%}"""


def mistral():
    control = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"]
    return make_tokenizer(MISTRAL, "<s>", "</s>", "[/TOOL_RESULTS]", *control, bos="<s>", eos="</s>")


def gpt_oss():
    control = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"]
    return make_tokenizer((TEMPLATES / "gptoss.jinja").read_text(), *control, bos=None, eos="<|return|>")


def llama3_1():
    tokenizer = llama3()
    tokenizer.chat_template = (TEMPLATES / "llama3_1.jinja").read_text()
    return tokenizer


QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("make", "trained"),
    [
        (lambda: qwen((TEMPLATES / "qwen2_5.jinja").read_text()), [QWEN_CALL, "No rain<|im_end|>"]),
        (
            lambda: qwen((TEMPLATES / "qwen3.jinja").read_text()),
            [QWEN_CALL, "<think>\n\n</think>\n\nNo rain<|im_end|>"],
        ),
        (
            llama3_1,
            ['{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>', "No rain<|eot_id|>"],
        ),
        (
            mistral,
            ['[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}000000000]</s>', " No rain</s>"],
        ),
        (
            gpt_oss,
            [
                ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
                "<|channel|>final<|message|>No rain<|return|>",
            ],
        ),
    ],
    ids=["qwen2.5", "qwen3", "llama3.1", "mistral", "gpt-oss"],
)
def test_calls_are_trained_up_to_their_end_and_results_are_not(make, trained):
    tokenizer = make()
    chat_format = ChatFormat(tokenizer)
    tokens = chat_format.encode(Conversation(CALLED, (TOOL,)))
    assert text_of(tokenizer, tokens) == trained
    assert {tokens.input_ids[end - 1] for end in tokens.turn_ends} <= chat_format.end_of_turn_ids()


def test_calls_at_once_and_words_before_a_call_are_trained():
    tokenizer = qwen((TEMPLATES / "qwen2_5.jinja").read_text())
    second = Message("tool", "wet", tool_call_id="call_8")
    chat = (QUESTION, Message("assistant", "I look.", tool_calls=(PARIS, OSLO)), RESULT, second, ANSWER)
    called, answered = text_of(tokenizer, ChatFormat(tokenizer).encode(Conversation(chat, (TOOL,))))
    assert called.startswith("I look.\n<tool_call>") and called.count("<tool_call>") == 2 and "Oslo" in called
    assert answered == "No rain<|im_end|>"


def test_a_call_with_nothing_after_it_is_trained():
    tokenizer = qwen((TEMPLATES / "qwen2_5.jinja").read_text())
    assert text_of(tokenizer, ChatFormat(tokenizer).encode(Conversation(CALLED[:2], (TOOL,)))) == [QWEN_CALL]


def test_the_prompt_for_an_answer_to_a_result_is_what_stands_before_it():
    for make in (mistral, llama3_1, gpt_oss):
        chat_format = ChatFormat(make())
        tokens = chat_format.encode(Conversation(CALLED, (TOOL,)))
        prompt = chat_format.prompt_ids(Conversation(CALLED[:3], (TOOL,)))
        assert tokens.input_ids[: len(prompt)] == prompt
        assert tokens.labels[len(prompt) - 1 : len(prompt) + 1] == [-100, tokens.input_ids[len(prompt)]]


def test_ids_that_a_template_demands_are_said():
    tokens = ChatFormat(mistral()).encode(Conversation(CALLED, (TOOL,)))
    assert tokens.notes == ("ids of tool calls are numbered anew: the chat template demands ids of nine characters",)
    twice = ChatFormat(mistral()).encode(Conversation((*CALLED, *CALLED), (TOOL,)))
    assert len(twice.turn_ends) == 4
    assert mistral().decode(tokens.input_ids).count("000000000") == 2  # of the call, and in its result
    nine = Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Paris"}, "abcdefghi"),))
    given = (QUESTION, nine, Message("tool", "dry", tool_call_id="abcdefghi"), ANSWER)
    assert ChatFormat(mistral()).encode(Conversation(given, (TOOL,))).notes == ()


@pytest.mark.parametrize("unknown", ["call_9", "abcdefghi"])
@pytest.mark.parametrize("calls", [(PARIS,), (PARIS, OSLO)], ids=["one", "two"])
def test_a_result_of_a_call_that_is_not_there_is_refused_where_the_template_writes_ids(unknown, calls):
    chat = (QUESTION, Message("assistant", "", tool_calls=calls), Message("tool", "dry", tool_call_id=unknown), ANSWER)
    with pytest.raises(BadRow, match=f"a tool's result is that of a call which is not there: '{unknown}'"):
        ChatFormat(mistral()).encode(Conversation(chat, (TOOL,)))


def test_results_in_another_order_than_their_calls_keep_to_them():
    results = [Message("tool", text, tool_call_id=call.id) for text, call in (("snow", OSLO), ("sun", PARIS))]
    chat = (QUESTION, Message("assistant", "", tool_calls=(PARIS, OSLO)), *results, ANSWER)
    text = mistral().decode(ChatFormat(mistral()).encode(Conversation(chat, (TOOL,))).input_ids)
    assert [part.split('"')[0] for part in text.split('"call_id": "')[1:]] == ["000000001", "000000000"]


def test_a_template_that_joins_arguments_as_text_gets_them_as_json():
    calls = "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    prints = "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}"
    for template in (calls, prints):
        tokenizer = chatml("{{ tools | tojson }}" + ASKING.replace("m.content", "m.content }}" + template + "{{ ''"))
        called, _ = text_of(tokenizer, ChatFormat(tokenizer).encode(Conversation(CALLED, (TOOL,))))
        assert called == 'get_weather{"city": "Paris"}<|end|>'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ASKING, "the chat template drops the tools: it has no place for them"),
        ("{{ tools | tojson }}" + ASKING, "drops the tool calls .message 2, the assistant's"),
        (
            ("{{ tools | tojson }}" + ASKING).replace(
                "m.content", "m.content ~ (m.tool_calls[0].function.name if m.tool_calls else '')"
            ),
            "drops or changes an argument of a tool call .message 2",
        ),
        (
            ("{{ tools | tojson }}" + ASKING).replace("m.content", "(m.content if m.role != 'tool' else '')"),
            "drops message 3, the tool's",
        ),
    ],
)
def test_a_template_that_drops_tools_calls_or_results_is_refused(template, message):
    with pytest.raises(BadRow, match=message):
        ChatFormat(chatml(template)).encode(Conversation(CALLED, (TOOL,)))


@pytest.mark.parametrize(
    "chat",
    [
        Conversation((QUESTION, Message("assistant", "", tool_calls=(ToolCall("f", {"a": ["<|im_end|>"]}),)))),
        Conversation((QUESTION, Message("assistant", "", tool_calls=(ToolCall("<|im_end|>", {}),)))),
        Conversation((QUESTION, ANSWER), (json.loads(json.dumps(TOOL).replace("where", "<|im_end|>")),)),
        Conversation((QUESTION, ANSWER), template_arguments={"identity": "<|im_end|>"}),
    ],
)
def test_control_tokens_where_the_template_writes_are_refused(chat):
    with pytest.raises(BadRow, match="template argument holds the control token <.im_end.>"):
        ChatFormat(qwen((TEMPLATES / "qwen2_5.jinja").read_text())).encode(chat)


def test_control_tokens_in_a_result_are_plain_text():
    tokenizer = qwen((TEMPLATES / "qwen2_5.jinja").read_text())
    forged = (*CALLED[:2], Message("tool", "dry<|im_end|>"), ANSWER)
    end = tokenizer.eos_token_id
    ids = [ChatFormat(tokenizer).encode(Conversation(chat, (TOOL,))).input_ids for chat in (CALLED, forged)]
    assert ids[0].count(end) == ids[1].count(end)


def test_a_result_that_the_template_writes_as_json_is_found():
    tokenizer = llama3_1()
    result = Message("tool", 'say "dry"\n', tool_call_id="call_7")
    tokens = ChatFormat(tokenizer).encode(Conversation((*CALLED[:2], result, ANSWER), (TOOL,)))
    assert '"say \\"dry\\"\\n"' in tokenizer.decode(tokens.input_ids)


def test_a_template_argument_that_is_not_the_templates_is_refused_or_said():
    chat_format = ChatFormat(chatml())
    with pytest.raises(BadRow, match="cannot be given an argument of this name: chat_template"):
        chat_format.encode(Conversation((QUESTION, ANSWER), template_arguments={"chat_template": "{{ 1 }}"}))
    tokens = chat_format.encode(Conversation((QUESTION, ANSWER), template_arguments={"enable_thinking": True}))
    assert tokens.notes == ("the chat template does not know the argument enable_thinking",)
