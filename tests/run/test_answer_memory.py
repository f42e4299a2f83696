"""What an answer takes of memory, and long prompts: read in parts, answered the same, or refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.adapter.chat import Chat, Sampling
from common.conversations.conversation import Conversation, Message
from common.model.loading import load_4bit
from common.recipe import ModelSpec, UserError
from common.run import answer_memory
from common.run.answer_memory import answer_bytes, cache_bytes
from common.run.generation import generate
from common.run.prompts import Prompt
from tests.conftest import FP32, TINY


@pytest.fixture(scope="module")
def model():
    return load_4bit(ModelSpec(str(TINY)), FP32)


@pytest.mark.parametrize(("architecture", "window"), [("llama", None), ("mistral", 12), ("gemma3_text", None)])
def test_keys_and_values_are_counted_as_transformers_keeps_them(architecture, window, small_model):
    changes = {} if window is None else {"sliding_window": window}
    model = AutoModelForCausalLM.from_pretrained(small_model(architecture, **changes), dtype=torch.float32)
    for tokens in (9, 40):
        with torch.no_grad():
            cache = model(torch.arange(tokens)[None], use_cache=True).past_key_values
        there = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        one_token = cache_bytes(model.config, 1, 4)  # which a window keeps less between two calls
        assert there <= cache_bytes(model.config, tokens, 4) <= there + one_token


def test_a_long_prompt_is_read_in_parts_and_answered_the_same(model, tokenizer, monkeypatch):
    prompt = Prompt(tokenizer("Start a tea timer, " * 20)["input_ids"], "", "")
    (expected,) = generate(model, tokenizer, [prompt], max_new_tokens=8)
    monkeypatch.setattr(answer_memory, "PART_TOKENS", 16)
    calls = []
    handle = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[1]))
    assert generate(model, tokenizer, [prompt], max_new_tokens=8) == [expected]
    handle.remove()
    assert max(calls) == 16 and sum(calls[: -(-len(prompt.input_ids) // 16)]) == len(prompt.input_ids)


def test_a_prompt_longer_than_the_models_positions_gets_no_answer_and_says_so(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 40)
    short, long = Prompt([5] * 6, "", ""), Prompt([5] * 40, "", "")
    answers = generate(model, tokenizer, [short, long, short], max_new_tokens=4)
    assert answers[0] == answers[2] and answers[1] == ""
    assert answers[1].cut == "before its first token: the prompt has 40 tokens, the model 40 positions"


def test_positions_are_those_that_a_chat_has_too(model, tokenizer, monkeypatch):
    """Qwen's documentation adds YaRN to config.json and leaves max_position_embeddings."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 40}
    monkeypatch.setattr(model.config, "max_position_embeddings", 40)
    monkeypatch.setattr(model.config, "rope_parameters", model.config.rope_parameters | yarn)
    prompts = [Prompt([5] * length, "", "") for length in (40, 80)]
    answered, too_long = generate(model, tokenizer, prompts, max_new_tokens=4)
    assert not answered.cut.startswith("before") and too_long.cut.endswith("80 tokens, the model 80 positions")


def test_long_prompts_are_answered_fewer_at_a_time(model, tokenizer):
    batches = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: batches.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    generate(
        model, tokenizer, [Prompt([5] * 40, "", "")] * 3 + [Prompt([5] * 9, "", "")], max_new_tokens=1, at_a_time=3
    )
    handle.remove()
    assert batches == [(3, 40), (1, 9)]


def test_a_chat_refuses_what_would_not_fit_beside_the_weights(model, tokenizer, monkeypatch):
    chat = Chat(model, tokenizer, Sampling(temperature=0, max_new_tokens=4))
    needed = answer_bytes(model.config, len(chat.chat_format.prompt_ids(asked("Hello"))) + 4, 4)
    monkeypatch.setattr("common.machine.device.available_ram", lambda: needed - 1)
    with pytest.raises(UserError, match=r"its keys and values, and what reading it takes, are 0.0 GiB, and 0.0 GiB"):
        chat.ask("Hello", lambda piece: None)
    assert not chat.turns
    monkeypatch.setattr("common.machine.device.available_ram", lambda: needed)
    chat.ask("Hello", lambda piece: None)


def test_a_chat_that_runs_out_of_memory_goes_on(model, tokenizer):
    chat = Chat(model, tokenizer, Sampling(temperature=0, max_new_tokens=4))

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory, injected")

    handle = model.get_decoder().layers[0].register_forward_pre_hook(fail)
    with pytest.raises(
        UserError, match=r"out of GPU memory at a conversation of \d+ tokens; the question is forgotten"
    ):
        chat.ask("Hello", lambda piece: None)
    handle.remove()
    assert not chat.turns
    assert chat.ask("Hello", lambda piece: None) is not None


def asked(text: str) -> Conversation:
    return Conversation((Message("user", text),))
