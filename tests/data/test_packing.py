import pytest

from common.data.chat_format import ChatFormat, Tokens
from common.data.conversation import Conversation, Message
from common.data.labels import IGNORED
from common.data.packing import fit_to_row, pack
from common.data.source_row import BadRow


def tokens(length: int, first: int = 10) -> Tokens:
    ids = list(range(first, first + length))
    return Tokens(ids, [IGNORED, *ids[1:]], [length])


def test_packed_rows_hold_every_token_once():
    lengths = [50, 3, 64, 20, 31, 7, 7, 40, 64, 1, 12]
    examples = [tokens(length, first=100 * n) for n, length in enumerate(lengths)]
    packed = pack(examples, 64)
    assert all(len(row["input_ids"]) == sum(row["seq_lengths"]) <= 64 for row in packed)
    assert sorted(sum(packed["input_ids"], [])) == sorted(token for e in examples for token in e.input_ids)
    assert sum(len(row["labels"]) for row in packed) == sum(lengths)
    assert len(packed) == 5  # 299 tokens need at least 4.7 rows: best fit leaves almost nothing empty


def test_pitfall_7_a_long_conversation_keeps_whole_turns(tokenizer):
    chat = tuple(
        Message(role, f"{role} says a few words in turn {turn}") for turn in range(6) for role in ("user", "assistant")
    )
    whole = ChatFormat(tokenizer).encode(Conversation(chat))
    (cut,) = fit_to_row(whole, whole.turn_ends[2] + 5, is_text=False)
    assert len(cut.input_ids) == whole.turn_ends[2]
    assert cut.input_ids[-1] == cut.labels[-1] == tokenizer.eos_token_id
    with pytest.raises(BadRow, match="its first answer ends after 12 tokens"):
        fit_to_row(whole, 12, is_text=False)


def test_a_long_text_is_cut_without_losing_a_token():
    pieces = fit_to_row(tokens(150), 64, is_text=True)
    assert [len(piece.input_ids) for piece in pieces] == [64, 64, 22]
    assert sum((piece.input_ids for piece in pieces), []) == tokens(150).input_ids
    assert all(piece.labels[0] == IGNORED for piece in pieces)
