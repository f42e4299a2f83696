"""What holds for every conversation, whatever its text, with the templates of all our models."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.conversations.conversation import Conversation
from common.conversations.row_reader import RowReader
from common.conversations.texts import is_blank
from common.data.batches import collate, split_into_examples
from common.data.packing import pack
from common.tokens.chat_format import IGNORED, ChatFormat
from tests.tokens.test_chat_format import TOKENIZERS

FORMATS = {name: ChatFormat(make()) for name, make in TOKENIZERS.items()}
CONTROL = ["<|eot_id|>", "<|im_end|>", "</s>", "<s>", "[INST]", "[/INST]", "<|begin_of_text|>", "<|im_start|>user\n"]
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
# Any text with something to see, and with control tokens in it that would end or forge a turn.
TEXT = st.lists(PLAIN | st.sampled_from(CONTROL), min_size=1, max_size=4).map("".join).map(str.strip)
TEXT = TEXT.filter(lambda text: not is_blank(text))
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


def conversation(system: str | None, turns: list[tuple[str, str]]) -> Conversation:
    """Makes a conversation as from a row of a file."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return RowReader("messages").read({"messages": messages})


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=100, deadline=None)
@given(system=st.none() | TEXT, turns=TURNS)
def test_every_conversation_is_tokenised_whole_and_only_its_answers_are_trained(name, system, turns):
    chat_format = FORMATS[name]
    tokenizer = chat_format.tokenizer
    chat = conversation(system, turns)
    tokens = chat_format.encode(chat)

    # No token is lost or doubled: together they are the template's own text.
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(tokens.input_ids, clean_up_tokenization_spaces=False) == whole

    # One BOS where the model has one, at the beginning.
    if tokenizer.bos_token_id is not None:
        assert tokens.input_ids.count(tokenizer.bos_token_id) == 1
        assert tokens.input_ids[0] == tokenizer.bos_token_id

    # What is trained is each answer and the token that ends its turn, and nothing else. Mistral's template writes a
    # space before an answer that is not in the prompt.
    space = " " if name == "mistral" else ""
    end = chat_format.end_of_turn_id()
    assert len(tokens.turn_ends) == len(turns)
    trained, start = [], 0
    for stop, (_, answer) in zip(tokens.turn_ends, turns, strict=True):
        labels = [label for label in tokens.labels[start:stop] if label != IGNORED]
        assert labels[-1] == end
        assert tokenizer.decode(labels[:-1], clean_up_tokenization_spaces=False) == space + answer
        trained += labels
        start = stop
    assert trained == [label for label in tokens.labels if label != IGNORED]
    assert all(label in (IGNORED, token) for label, token in zip(tokens.labels, tokens.input_ids, strict=True))

    # No message adds a control token: there are as many as in a conversation of one-letter messages.
    plain = chat_format.encode(conversation(system and "a", [("a", "a") for _ in turns]))
    assert controls(chat_format, tokens.input_ids) == controls(chat_format, plain.input_ids)


def controls(chat_format: ChatFormat, ids: list[int]) -> Counter[int]:
    return Counter(token for token in ids if token in chat_format.control.ids)


@settings(max_examples=50, deadline=None)
@given(st.lists(TURNS, min_size=1, max_size=12), st.integers(0, 200), st.integers(1, 4), st.booleans())
def test_packed_rows_hold_every_token_of_every_conversation_once(chats, spare, rows, padding_free):
    examples = [FORMATS["llama3"].encode(conversation(None, turns)) for turns in chats]
    seq_len = max(len(example.input_ids) for example in examples) + spare
    packed = pack(examples, seq_len)
    assert all(len(row["input_ids"]) <= seq_len for row in packed)
    found = []
    for start in range(0, len(packed), rows):
        batch = collate(
            [packed[i] for i in range(start, min(start + rows, len(packed)))], pad_token_id=0, padding_free=padding_free
        )
        found += [
            (tuple(e["input_ids"][0].tolist()), tuple(e["labels"][0].tolist())) for e in split_into_examples(batch)
        ]
    assert Counter(found) == Counter((tuple(e.input_ids), tuple(e.labels)) for e in examples)
