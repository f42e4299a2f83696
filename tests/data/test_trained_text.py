"""An example as text: every character is there, and what is trained is marked."""

import pytest

from common.conversations.conversation import Conversation, Message
from common.data.trained_text import MAX_LINES, MAX_PIECE_CHARACTERS, lay_out, trained_pieces
from common.tokens.chat_format import ChatFormat, Tokens
from common.tokens.labels import IGNORED

TWO_TURNS = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hi\nyou"),
        Message("user", "More"),
        Message("assistant", "No"),
    )
)


def test_the_pieces_together_are_the_text_of_all_tokens(tokenizer):
    tokens = ChatFormat(tokenizer).encode(TWO_TURNS)
    pieces = trained_pieces(tokens, tokenizer)
    assert "".join(text for text, _ in pieces) == tokenizer.decode(tokens.input_ids)
    assert [text for text, is_trained in pieces if is_trained] == ["Hi\nyou<|end|>", "No<|end|>"]
    assert [is_trained for _, is_trained in pieces] == [False, True, False, True]


class Metaspace:
    """A decoder as SentencePiece's: a space before each word, dropped before the first one that it is given."""

    def decode(self, ids, **_):
        return "".join(f" {index}" for index in ids).removeprefix(" ")


def test_the_space_before_a_trained_part_is_kept():
    tokens = Tokens([1, 2, 3, 4], [IGNORED, 2, 3, IGNORED], [3])
    assert trained_pieces(tokens, Metaspace()) == [("1", False), (" 2 3", True), (" 4", False)]


def test_a_character_that_a_boundary_splits_stands_in_one_piece(tokenizer):
    ids = tokenizer("試", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1  # its bytes are tokens of their own
    tokens = Tokens(ids, [IGNORED, *ids[1:]], [len(ids)])
    assert trained_pieces(tokens, tokenizer)[-1] == ("試", True)


def test_each_message_stands_on_lines_of_its_own(tokenizer):
    pieces = trained_pieces(ChatFormat(tokenizer).encode(TWO_TURNS), tokenizer)
    assert lay_out(pieces, on_terminal=False) == [
        "    <s><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>",
        "  ↳ ⟦Hi",
        "    you<|end|>⟧",
        "  ↳ <|user|>More<|end|><|assistant|>",
        "  ↳ ⟦No<|end|>⟧",
    ]


def test_a_line_break_of_the_text_is_no_break_of_the_layout():
    pieces = [("user\nHello<end>\nassistant\n", False), ("Hi<end>", True), ("\nuser\nBye", False)]
    assert lay_out(pieces, on_terminal=False) == [
        "    user",
        "    Hello<end>",
        "    assistant",
        "    ⟦Hi<end>⟧",
        "    user",
        "    Bye",
    ]
    assert lay_out([("Hi", False), ("no<end>", True), ("\n", False)], on_terminal=False)[-1] == "  ↳ ⟦no<end>⟧"


def test_a_terminal_underlines_each_trained_line():
    assert lay_out([("ask\n", False), ("a\n\nb", True)], on_terminal=True) == [
        "    ask",
        "    \033[4ma\033[0m",
        "",
        "    \033[4mb\033[0m",
    ]


@pytest.mark.parametrize("on_terminal", [False, True])
@pytest.mark.parametrize("bad", ["\x1b[31m", "\x00", "\r", "\u202e", "\x9b", "\t", "\u2028"])
def test_nothing_that_a_terminal_would_obey_is_printed(bad, on_terminal):
    shown = "".join(lay_out([(f"a{bad}b", False), (f"c{bad}d", True)], on_terminal=on_terminal))
    shown = shown.replace("\033[4m", "").replace("\033[0m", "")
    assert bad not in shown and repr(bad)[1:-1] in shown


def test_a_long_piece_is_shortened_in_its_middle_and_says_so():
    text = "".join(f"{n:05d}" for n in range(1000))
    (line,) = lay_out([(text, True)], on_terminal=False)
    assert line.startswith("    ⟦00000") and line.endswith("00999⟧")
    assert f"[… {5000 - MAX_PIECE_CHARACTERS:,} characters …]" in line


def test_many_lines_are_shortened_in_their_middle():
    lines = lay_out([("\n".join(str(n) for n in range(100)), False)], on_terminal=False)
    assert len(lines) == MAX_LINES + 1
    assert (lines[0], lines[-1]) == ("    0", "    99") and f"    [… {100 - MAX_LINES} lines …]" in lines


class Counting(Metaspace):
    """Counts the tokens that it decodes."""

    tokens = 0

    def decode(self, ids, **_):
        self.tokens += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize("turns", [10, 1000])
def test_a_conversation_of_many_turns_is_decoded_in_linear_time(turns):
    ids = list(range(6 * turns))
    tokens = Tokens(ids, [IGNORED if index % 6 < 3 else index for index in ids], [])
    pieces = trained_pieces(tokens, counting := Counting())
    assert len(pieces) == 2 * turns
    assert "".join(text for text, _ in pieces) == Metaspace().decode(ids)
    assert counting.tokens < 3 * len(ids)
