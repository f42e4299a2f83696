"""GGUF files of the real model, whose embedding is its head too: llama.cpp goes on as transformers does."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.k_quants import read_gguf
from common.adapter.find import find_adapter
from common.adapter.load import trained_tokenizer
from common.adapter.merge import MergedWeights
from tests.adapter.test_gguf import LlamaCpp, export
from tests.conftest import ROOT

HELD_OUT = ROOT / "data" / "tiny" / "held_out.jsonl"
TOKENS = 10  # of an answer
ASKED = [  # half of the fifty; the other half is from the held-out rows' task
    "What is the capital of France?",
    "Name the largest planet.",
    "Write a line about the sea.",
    "What is 17 plus 25?",
    "Translate 'good morning' to Spanish.",
    "Who wrote Hamlet?",
    "List three fruits.",
    "What does HTTP stand for?",
    "Write a Python function that adds two numbers.",
    "Is the number 7 prime?",
    "How many legs does a spider have?",
    "What colour is a ripe banana?",
    "你好,你是谁?",
    "¿Cuál es la capital de España?",
    "Wie heißt die Hauptstadt von Österreich?",
    "🎉 What is this emoji?",
    "Sort these: 3, 1, 2.",
    "Explain gravity in one sentence.",
    "What is H2O?",
    "Give me a synonym of 'quick'.",
    "Complete: roses are red,",
    "When did the second world war end?",
    "What is the opposite of 'hot'?",
    "Name a country in Africa.",
    "  Two spaces,\tand a tab\n\nand lines?  ",
]
# The relative rounding of what llama.cpp multiplies by: half of a last bit of f16 and of bf16, and of an int8 beside
# the largest of 32 values, which is about twice as large as the others. It runs through 60 blocks (attention and MLP of
# 30 layers) as a random walk: times the square root of 60. A logit is a few nats away from the mean: at most 6.
ROUNDING = {"f16": 2**-12, "bf16": 2**-9, "q8_0": 2 / 254}
NOISE = {quant: rounding * 60**0.5 * 6 for quant, rounding in ROUNDING.items()}  # nats: 0.011, 0.09, 0.37


def questions(tasks: list[str]) -> list[list[dict[str, str]]]:
    """Fifty conversations up to the answer."""
    chats = [[{"role": "user", "content": text}] for text in ASKED]
    chats += [[{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": text}] for text in tasks]
    assert len(chats) == 50
    return chats


@dataclass
class Answer:
    """Token ids of a prompt and of a greedy answer, and the log-probabilities of the five likeliest at each token."""

    prompt: list[int]
    ids: list[int]
    likeliest: list[dict[int, float]]  # none where llama.cpp did not tell of each token


def ask(runtime: LlamaCpp, prompt: list[int], tokenizer: Any) -> Answer:
    request = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 5}
    told = runtime.server.handle_completions(request)
    choice = told["choices"][0]
    tokens = choice["logprobs"]["content"]
    if len(tokens) == told["usage"]["completion_tokens"]:
        likeliest = [{entry["id"]: entry["logprob"] for entry in token["top_logprobs"]} for token in tokens]
        return Answer(prompt, [token["id"] for token in tokens], likeliest)
    # It leaves out each token that ends within a character.
    ended = [tokenizer.eos_token_id] if choice["finish_reason"] == "stop" else []
    ids = tokenizer(choice["text"].rstrip("\ufffd"))["input_ids"] + ended
    assert len(tokens) <= len(ids) <= told["usage"]["completion_tokens"]
    return Answer(prompt, ids, [])


def log_probabilities(model: Any, answers: list[Answer]) -> list[torch.Tensor]:
    """Of transformers, for each token of each answer: fp32 (tokens, vocabulary)."""
    rows = [torch.tensor(answer.prompt + answer.ids) for answer in answers]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # what follows a row changes nothing in it
    logits = model(input_ids=ids).logits
    spans = [slice(len(a.prompt) - 1, len(a.prompt) + len(a.ids) - 1) for a in answers]
    return [row[span].log_softmax(-1) for row, span in zip(logits, spans, strict=True)]


@pytest.fixture(scope="module")
def model(real_model) -> Any:
    return AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()


@pytest.mark.slow  # fifty answers of llama.cpp, and their tokens through transformers
@pytest.mark.parametrize("quant", NOISE)
@torch.no_grad()
def test_fifty_answers_are_token_for_token_those_of_transformers(trained, model, tmp_path, quant):
    """transformers has the weights of the same file, in fp32, and reads the answers of llama.cpp.

    Each of their tokens is the likeliest for it too, and so its own answer; or both take the two for equally likely, up
    to what rounding does to llama.cpp's numbers: four standard deviations of the difference of two of them at most.
    """
    weights = MergedWeights(find_adapter(trained))
    runtime, tokenizer = LlamaCpp(export(trained, tmp_path / "x.gguf", quant)), trained_tokenizer(weights.adapter)
    assert "output.weight" not in read_gguf(tmp_path / "x.gguf", model)
    if quant == "bf16":
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights.merged(name).bfloat16().float()), name
    tasks = [json.loads(line)["messages"][0]["content"] for line in HELD_OUT.read_text().splitlines()[:25]]
    chats = questions(tasks)
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True) for c in chats]
    answers = [ask(runtime, prompt["input_ids"], tokenizer) for prompt in prompts]

    errors, gaps, same = [], [], 0
    for start in range(0, 50, 10):
        part = answers[start : start + 10]
        for answer, expected in zip(part, log_probabilities(model, part), strict=True):
            for told, wanted in zip(answer.likeliest, expected, strict=False):
                errors += [logprob - wanted[index].item() for index, logprob in told.items()]
            gaps += [(wanted.max() - wanted[token]).item() for token, wanted in zip(answer.ids, expected, strict=True)]
            same += bool((expected.argmax(-1) == torch.tensor(answer.ids)).all())
    noise = torch.tensor(errors).square().mean().sqrt().item()
    print(f"{quant}: {same} of 50 the same, noise {noise:.4f} nats, gaps {sorted(gaps)[-5:]}, {len(gaps)} tokens")
    assert len(errors) / 5 > 50 * TOKENS / 2
    assert noise <= NOISE[quant]
    assert max(gaps) <= 4 * 2**0.5 * noise
    assert same >= 40

    for chat, prompt in list(zip(chats, prompts, strict=True))[:50:10]:  # through llama.cpp's own template engine
        answer = runtime.server.handle_chat_completions({"messages": chat, "max_tokens": 1, "temperature": 0})
        assert answer["usage"]["prompt_tokens"] == len(prompt["input_ids"])
