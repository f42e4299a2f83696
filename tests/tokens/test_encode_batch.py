"""Many conversations at once, and long ones: the same tokens, in linear time."""

import time

from common.conversations.conversation import Conversation, Message
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat
from tests.tokens.test_chat_format import CHAT, SYSTEM, llama3, mistral, qwen
from tests.tokens.test_thoughts import APART, INLINE, template
from tests.tokens.test_training_spans import ANSWERS, LLAMA2, sentencepiece

EXAMPLES = [
    Conversation(CHAT),
    Conversation(SYSTEM),
    Conversation(APART),
    Conversation(INLINE),
    Conversation((Message("user", "alone"),)),
    "Plain text",
    "<|eot_id|></s><|im_end|>",
    *(
        Conversation((Message("user", answer), Message("assistant", answer)))
        for answer in [*ANSWERS, "</s>", "<|eot_id|>"]
    ),
]


def long_chat(turns: int) -> Conversation:
    return Conversation(tuple(Message("assistant" if i % 2 else "user", f"turn {i}") for i in range(turns)))


def test_a_batch_gives_what_each_example_gives_alone():
    for make in (llama3, mistral, lambda: qwen(template("qwen3")), lambda: sentencepiece(LLAMA2, legacy=True)):
        together = ChatFormat(make()).encode_batch(EXAMPLES)
        for example, found in zip(EXAMPLES, together, strict=True):
            try:
                alone = ChatFormat(make()).encode(example)
            except BadRow as fault:
                assert isinstance(found, BadRow) and str(found) == str(fault)
            else:
                assert found == alone


def test_a_batch_of_nothing_is_nothing():
    assert ChatFormat(llama3()).encode_batch([]) == []


def test_a_long_conversation_takes_time_in_proportion_to_its_turns():
    for make in (llama3, lambda: qwen(template("qwen3"))):
        chat_format, seconds = ChatFormat(make()), {}
        for turns in (800, 1600, 3200):
            start = time.process_time()
            tokens = chat_format.encode(long_chat(turns))
            seconds[turns] = time.process_time() - start
            assert len(tokens.turn_ends) == turns // 2
        assert seconds[1600] < 1
        assert seconds[3200] < 3 * seconds[1600] + 0.1  # four times where each turn looks at all others


def test_only_so_many_structures_are_kept(monkeypatch):
    monkeypatch.setattr("common.tokens.rendering.MAX_LAYOUTS", 8)
    chat_format = ChatFormat(llama3())
    for turns in range(2, 60, 2):
        chat_format.encode(long_chat(turns))
    assert len(chat_format.renderer._layouts) <= 8
    assert len(chat_format.turn_finder._found) <= 9
