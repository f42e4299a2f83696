"""Chats of several turns, streamed: characters that several tokens make are shown when they are whole."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LogitsProcessorList

from common.adapter.chat import Chat, Sampling
from common.adapter.find import find_adapter
from common.adapter.load import load_trained, trained_tokenizer

TEXTS = [
    "🎉🚀 go 👩\u200d👩\u200d👧 now",
    "你好,世界。龘 𠮷野家",
    "e\u0301a\u0308o\u0323\u0302 Zalgo\u0335\u0321 नमस्ते ภาษาไทย",
    "한국어 🇫🇷\n日本語の文\n\nmixed 好🎉好 end",
]


@pytest.fixture(scope="module")
def parts(trained):
    adapter = find_adapter(trained)
    return load_trained(adapter), trained_tokenizer(adapter)


class Dictated:
    """Makes the model say these tokens, whatever it would say: it does not know enough of these scripts to be asked."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: Iterator[int] = iter(ids)

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.ids)] = 0.0
        return forced


def dictate(chat: Chat, ids: list[int]) -> None:
    chat.arguments["logits_processor"] = LogitsProcessorList([Dictated(ids)])


@pytest.mark.slow  # loads the model
def test_characters_are_shown_whole_and_remembered_as_they_were_said(parts, monkeypatch):
    model, tokenizer = parts
    chat, prompts, generate = Chat(model, tokenizer), [], Chat._generate

    def generate_and_note(self, prompt, printer):
        prompts.append(prompt)
        generate(self, prompt, printer)

    monkeypatch.setattr(Chat, "_generate", generate_and_note)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert any("\ufffd" in tokenizer.decode([token]) for token in ids), "no token cuts a character"
        dictate(chat, [*ids, tokenizer.eos_token_id])
        pieces: list[str] = []
        assert chat.ask(f"Say: {text}", pieces.append) == text
        assert "".join(pieces) == text
        assert len([piece for piece in pieces if piece]) > 1  # not all of it at the end
        assert not any("\ufffd" in piece for piece in pieces)
    # Each prompt is the one before it, the answer to that as the model said it, and a new question.
    for text, before, after in zip(TEXTS, prompts, prompts[1:], strict=False):
        said = [*before, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert after[: len(said)] == said


@pytest.mark.slow  # loads the model
@pytest.mark.parametrize("tokens", range(1, 8))
def test_an_answer_cut_within_a_character_shows_no_part_of_it(parts, tokens):
    model, tokenizer = parts
    text = "go 🚀🎉"
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids[:tokens]).rstrip("\ufffd")
    chat = Chat(model, tokenizer, Sampling(max_new_tokens=tokens))
    dictate(chat, [*ids, tokenizer.eos_token_id])
    pieces: list[str] = []
    assert chat.ask("Go", pieces.append) == whole == "".join(pieces)
    assert text.startswith(whole)


@pytest.mark.slow  # loads the model
@torch.no_grad()
def test_the_second_answer_is_that_of_transformers_to_the_whole_conversation(parts):
    model, tokenizer = parts
    chat = Chat(model, tokenizer, Sampling(temperature=0, max_new_tokens=24), adapter_on=False)
    first = chat.ask("My name is Ada. Please remember my name.", lambda piece: None)
    second = chat.ask("What is my name?", lambda piece: None)
    assert "Ada" in second, (first, second)
    turns = [{"role": turn.role, "content": turn.content} for turn in chat.turns[:-1]]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with model.disable_adapter():
        outputs = model.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == second
