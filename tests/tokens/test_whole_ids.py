"""Nothing is lost at the edges: first tokens, end tokens, and texts that hold the marks that tokenising uses itself."""

from copy import deepcopy
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from common.conversations.conversation import Conversation, Message, ToolCall
from common.data.batches import collate
from common.data.packing import pack
from common.model.loading import load_tokenizer
from common.recipe import ModelSpec
from common.tokens.chat_format import IGNORED, ChatFormat
from common.tokens.outline import HOLE
from tests.real_tokenizers import TRL_TEMPLATES
from tests.tokens.test_tool_calls import TOOL
from tests.tokens.test_training_spans import ASKING, chatml, text_of

TEMPLATES = {"qwen2_5": "qwen2_5", "qwen3": "qwen3", "llama3": "llama3", "smollm2": None}
CHAT = (
    Message("system", "Be kind."),
    Message("user", "Hello, who are you?"),
    Message("assistant", "I am a model."),
    Message("user", "7 + 5?"),
    Message("assistant", "12"),
)


def tokenizer_of(real_tokenizer, name: str):
    return real_tokenizer(name, TRL_TEMPLATES[TEMPLATES[name]] if TEMPLATES[name] else None)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "smollm2"])
def test_a_tokenizer_without_a_bos_loses_no_first_token(real_tokenizer, name):
    """Of SmolLM2 the BOS is <|im_start|>, which its tokenizer puts before no text."""
    tokenizer = tokenizer_of(real_tokenizer, name)
    chat_format = ChatFormat(tokenizer)
    for text in ("Once upon a time", "7", "Émile", "\n\nnew"):
        tokens = chat_format.encode(text)
        assert tokens.input_ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert tokens.labels == [IGNORED, *tokens.input_ids[1:]]
    messages = [{"role": m.role, "content": m.content} for m in CHAT]
    encoded = chat_format.encode(Conversation(CHAT))
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat_format.prompt_ids(Conversation(CHAT[:-1])) == prompt
    assert tokenizer.decode(encoded.input_ids[0]) == "<|im_start|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_completion_together_are_the_whole(real_tokenizer, name):
    """The ids of the prompt, then those that are trained: no first token of an answer is missing, or twice."""
    tokenizer = tokenizer_of(real_tokenizer, name)
    chat_format = ChatFormat(tokenizer)
    tokens = chat_format.encode(Conversation(CHAT))
    for turn, end in zip((2, 4), tokens.turn_ends, strict=True):
        prompt = chat_format.prompt_ids(Conversation(CHAT[:turn]))
        answer = tokens.labels[len(prompt) : end]
        if "qwen3" in name and turn == 4:  # writes an empty think block that the prompt does not hold
            answer = answer[answer.index(tokenizer.convert_tokens_to_ids("</think>")) + 2 :]
        assert IGNORED not in answer and tokenizer.decode(answer[:-1]) == CHAT[turn].content
        assert tokens.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_token_is_trained_where_the_pad_token_is_the_end_token(real_tokenizer, tmp_path, name):
    """As many tokenizers on the hub are. We pad with another token; and what is padded is known by its place."""
    tokenizer = deepcopy(tokenizer_of(real_tokenizer, name))  # what tests share keeps its own
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    end = ChatFormat(tokenizer).end_of_turn_id()
    assert end == tokenizer.eos_token_id
    assert load_tokenizer(ModelSpec(str(tmp_path))).pad_token_id not in {end, None}
    encoded = [ChatFormat(tokenizer).encode(Conversation(CHAT[:length])) for length in (5, 3)]
    batch = collate([row for one in encoded for row in pack([one], 512)], tokenizer.pad_token_id)
    for labels, one in zip(batch["labels"], encoded, strict=True):
        trained = [label for label in labels.tolist() if label != IGNORED]
        assert trained[-1] == end and trained.count(end) == len(one.turn_ends)


MARKS = [HOLE, f"{HOLE}0{HOLE}", f"{HOLE}1{HOLE}\ue0010\ue001", "\ue0010\ue001"]


@pytest.mark.parametrize("mark", MARKS)
def test_our_own_marks_are_text_wherever_they_stand(mark):
    """In every text, in the template, and in what a template may write beside the texts."""
    tool = {"type": "function", "function": {**TOOL["function"], "description": f"Tells {mark}"}}
    call = ToolCall("get_weather", {"city": mark}, "call_7")
    chat = Conversation(
        (
            Message("system", f"Be {mark}"),
            Message("user", mark),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", f"a{mark}", name="get_weather", tool_call_id="call_7"),
            Message("assistant", f"{mark} it is"),
        ),
        (tool,),
        {"identity": f"you are {mark}"},
    )
    calls = "{% for c in m.tool_calls or [] %}{{ c.function | tojson(ensure_ascii=False) }}{% endfor %}"
    plain = "{{ identity }}" + ASKING
    with_tools = "{{ tools | tojson(ensure_ascii=False) }}" + plain.replace(
        "m.content", "m.content }}" + calls + "{{ ''"
    )
    for template in (with_tools, with_tools.replace("<|end|>", f"{mark}<|end|>")):
        tokenizer = chatml(template)
        called, answer = text_of(tokenizer, ChatFormat(tokenizer).encode(chat))
        assert mark in called and called.startswith('{"name": "get_weather"')
        assert answer.startswith(f"{mark} it is")
    without = replace(chat, messages=(*chat.messages[:2], chat.messages[-1]), tools=())
    tokenizer = chatml(plain)
    tokens = ChatFormat(tokenizer).encode(without)
    assert text_of(tokenizer, tokens) == [f"{mark} it is<|end|>"]
    assert tokenizer.decode(tokens.input_ids).startswith(f"you are {mark}")


@pytest.mark.parametrize("word", ["Hello", "Hi", "Be kind", "look_up", "000000000", "good"])
def test_a_template_may_hold_the_words_of_the_conversations_that_it_is_asked_about(word):
    tokenizer = chatml(ASKING.replace("<|end|>", f"{word}<|end|>").replace("{% for", f"{word} {{% for", 1))
    tokens = ChatFormat(tokenizer).encode(Conversation((Message("user", word), Message("assistant", word))))
    assert text_of(tokenizer, tokens) == [f"{word}{word}<|end|>"]
