"""Thoughts before an answer: which are trained, with the templates of reasoning models."""

import pytest

from common.conversations.conversation import Conversation, Message
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat
from tests.tokens.test_chat_format import QWEN3, TEMPLATES, llama3, qwen
from tests.tokens.test_tool_calls import gpt_oss
from tests.tokens.test_training_spans import text_of

DROPPED = "answers are not trained whose thoughts the chat template drops"
APART = (
    Message("user", "1+1?"),
    Message("assistant", "2", reasoning="easy"),
    Message("user", "2+2?"),
    Message("assistant", "4", reasoning="well"),
)
INLINE = tuple(
    Message(m.role, f"<think>\n{m.reasoning}\n</think>\n\n{m.content}" if m.reasoning else m.content) for m in APART
)


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


@pytest.mark.parametrize("chat", [APART, INLINE], ids=["apart", "inline"])
@pytest.mark.parametrize(
    ("make", "trained", "notes"),
    [
        (lambda: qwen(template("qwen3")), ["<think>\nwell\n</think>\n\n4<|im_end|>"], (DROPPED,)),
        (lambda: qwen(template("qwen3_5_think")), ["well\n</think>\n\n4<|im_end|>"], (DROPPED,)),
        (
            lambda: qwen(template("qwen3_8")),
            ["easy\n</think>\n\n2<|im_end|>", "well\n</think>\n\n4<|im_end|>"],
            (),
        ),
        (
            lambda: qwen(template("qwen3_5_nothink")),
            ["well\n</think>\n\n4<|im_end|>"],
            ("answers are trained behind the prompt that enable_thinking=True gives", DROPPED),
        ),
        (
            gpt_oss,
            [
                "<|channel|>analysis<|message|>well<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            ],
            (DROPPED,),
        ),
    ],
    ids=["qwen3", "qwen3.5 thinking", "qwen3.8", "qwen3.5", "gpt-oss"],
)
def test_thoughts_that_the_template_writes_are_trained_and_turns_without_theirs_are_not(make, trained, notes, chat):
    tokenizer = make()
    tokens = ChatFormat(tokenizer).encode(Conversation(chat))
    assert text_of(tokenizer, tokens) == trained
    assert set(tokens.notes) == set(notes)


def test_a_template_that_knows_no_thoughts_is_refused_and_inline_ones_are_the_answers_text():
    tokenizer = llama3()
    with pytest.raises(BadRow, match="no answer can be trained: the chat template drops their thoughts"):
        ChatFormat(tokenizer).encode(Conversation(APART))
    assert text_of(tokenizer, ChatFormat(tokenizer).encode(Conversation(INLINE))) == [
        "<think>\neasy\n</think>\n\n2<|eot_id|>",
        "<think>\nwell\n</think>\n\n4<|eot_id|>",
    ]


def test_with_everything_trained_an_answer_without_its_thoughts_is_said_to_be():
    tokens = ChatFormat(qwen(template("qwen3"))).encode(Conversation(APART), "everything")
    assert tokens.notes == ("answers are trained without their thoughts, which the chat template drops",)
    assert tokens.labels[1:] == tokens.input_ids[1:]


@pytest.mark.parametrize("chat", [APART, INLINE], ids=["apart", "inline"])
def test_every_thought_is_trained_with_our_template_for_qwen3(chat):
    tokenizer = qwen(QWEN3)
    tokens = ChatFormat(tokenizer).encode(Conversation(chat))
    assert text_of(tokenizer, tokens) == [
        "<think>\neasy\n</think>\n\n2<|im_end|>",
        "<think>\nwell\n</think>\n\n4<|im_end|>",
    ]
    mixed = ChatFormat(tokenizer).encode(Conversation((*chat[:2], *APART[:1], Message("assistant", "2"))))
    assert text_of(tokenizer, mixed)[1] == "2<|im_end|>"


def test_words_about_tags_are_no_thoughts():
    tokenizer = qwen(template("qwen3"))
    chat = (Message("user", "what is </think>?"), Message("assistant", "A tag"))
    (trained,) = text_of(tokenizer, ChatFormat(tokenizer).encode(Conversation(chat)))
    assert trained.endswith("A tag<|im_end|>")


def test_thoughts_may_hold_control_tokens_and_blanks():
    tokenizer = qwen(template("qwen3_8"))
    chat = (Message("user", "one"), Message("assistant", " \nHi", reasoning="\n a<|im_end|> \n"))
    tokens = ChatFormat(tokenizer).encode(Conversation(chat))
    assert text_of(tokenizer, tokens) == ["a<|im_end|>\n</think>\n\nHi<|im_end|>"]
    assert tokens.labels.count(tokenizer.eos_token_id) == 1
