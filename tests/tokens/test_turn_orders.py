"""Turns in any order that the template accepts, and turns that the data says not to learn."""

from dataclasses import replace

import pytest

from common.conversations.conversation import Conversation, Message
from common.sources.source_row import BadRow
from common.tokens.chat_format import IGNORED, ChatFormat
from tests.tokens.test_chat_format import TEMPLATES, llama3, mistral, qwen
from tests.tokens.test_training_spans import chatml, text_of

S, U, A = Message("system", "Be kind"), Message("user", "one"), Message("assistant", "Hi")
EMPTY = Message("system", "")


@pytest.mark.parametrize(
    ("chat", "trained"),
    [
        ((A, U, A), 2),  # begins with the assistant
        ((S, A), 1),
        ((A,), 1),
        ((U, A, A), 2),
        ((U, U, A), 1),
        ((U, S, A), 1),
        ((U, A, S, U, A), 2),
        ((EMPTY, U, A), 1),
        ((EMPTY, A), 1),
        ((U, A, EMPTY, U, A), 2),
    ],
    ids=lambda value: "".join(m.role[0] for m in value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("make", [llama3, lambda: qwen((TEMPLATES / "qwen2_5.jinja").read_text()), chatml])
def test_every_answer_is_trained_whatever_stands_before_it(make, chat, trained):
    tokenizer = make()
    tokens = ChatFormat(tokenizer).encode(Conversation(chat))
    assert [text.removesuffix(tokenizer.eos_token) for text in text_of(tokenizer, tokens)] == ["Hi"] * trained


def test_a_conversation_is_trained_up_to_its_last_answer():
    tokenizer = qwen((TEMPLATES / "qwen3.jinja").read_text())
    tokens = ChatFormat(tokenizer).encode(Conversation((U, replace(A, reasoning="so"), U, S)))
    assert text_of(tokenizer, tokens) == ["<think>\nso\n</think>\n\nHi<|im_end|>"]  # as if it ended there
    assert tokens.notes == ("what follows the last answer is left out",)
    assert tokens.input_ids == ChatFormat(tokenizer).encode(Conversation((U, replace(A, reasoning="so")))).input_ids


@pytest.mark.parametrize("chat", [(U,), (S, U), (S,)])
def test_a_conversation_without_the_assistant_is_refused(chat):
    with pytest.raises(BadRow, match="the assistant has no turn in it"):
        ChatFormat(llama3()).encode(Conversation(chat))


@pytest.mark.parametrize(("learnt", "trained"), [((0,), ["1"]), ((1,), ["2"]), ((0, 2), ["1", "3"])])
@pytest.mark.parametrize("make", [llama3, mistral, chatml])
def test_answers_that_are_not_to_be_learnt_are_not_trained(make, learnt, trained):
    answers = [Message("assistant", str(i + 1), is_trained=i in learnt) for i in range(3)]
    chat = tuple(message for answer in answers for message in (U, answer))
    tokenizer = make()
    tokens = ChatFormat(tokenizer).encode(Conversation(chat))
    assert [text.strip().removesuffix(tokenizer.eos_token) for text in text_of(tokenizer, tokens)] == trained
    assert tokens.turn_ends == [i + 1 for i, label in enumerate(tokens.labels) if label == tokenizer.eos_token_id]
    whole = ChatFormat(tokenizer).encode(Conversation(chat), "everything")
    untrained = [i for i, label in enumerate(whole.labels) if label == IGNORED and i]
    assert [
        t.strip() for t in tokenizer.decode([whole.input_ids[i] for i in untrained]).split(tokenizer.eos_token)
    ] == [
        *(answer.content for answer in answers if not answer.is_trained),
        "",
    ]


def test_a_conversation_with_nothing_to_learn_is_refused():
    with pytest.raises(BadRow, match="none of its answers is to be learnt, the data says"):
        ChatFormat(llama3()).encode(Conversation((U, replace(A, is_trained=False))))


def test_what_a_template_drops_is_named_with_its_place():
    first_only = (
        "{% for m in messages %}{% if m.role != 'system' or loop.first %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    )
    first_only += "{% endif %}{% endfor %}"
    with pytest.raises(BadRow, match="the chat template drops message 3, the system's"):
        ChatFormat(chatml(first_only)).encode(Conversation((U, A, S, U, A)))
