"""Tokenises text piece by piece, so that the pieces' tokens together are those of one text."""

from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerFast

from common.recipe import UserError
from common.tokens.control_tokens import ControlTokens


@dataclass(frozen=True)
class Piece:
    """A part of a text."""

    text: str
    is_plain: bool = False  # control tokens in it are plain text
    follows: str = ""  # the text before it, where there is any


class PieceTokeniser:
    """Tokenises pieces with one tokenizer.

    SentencePiece tokenizers put a blank before a text. Inside a text they must not: a piece that follows another is
    tokenised behind a line break, whose tokens are then left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control: ControlTokens) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.control = control
        self.alone = cache(self._encode)
        self.adds_blank = self._behind_line_break("a") != self._encode("a")
        # Older ones put it behind each control token too.
        after_control = self._encode(f"{control.texts[0]}a")[1:] if control.texts else []
        self.adds_blank_after_control = self.adds_blank and after_control == self._encode("a")

    def encode(self, pieces: list[Piece]) -> list[list[int]]:
        """Returns the ids of each piece, those of whole texts in one call of the tokenizer."""
        self.backend.no_truncation()  # what a tokenizer.json or another caller has set
        self.backend.no_padding()
        together = [i for i, piece in enumerate(pieces) if not (piece.is_plain or piece.follows)]
        found = self.backend.encode_batch_fast([pieces[i].text for i in together], add_special_tokens=False)
        ids = dict(zip(together, (encoding.ids for encoding in found), strict=True))
        return [ids[i] if i in ids else self._encode_piece(piece) for i, piece in enumerate(pieces)]

    def _encode_piece(self, piece: Piece) -> list[int]:
        continues = piece.follows and self.adds_blank
        if continues and self.adds_blank_after_control and piece.follows.endswith(self.control.texts):
            continues = False
        self.backend.encode_special_tokens = piece.is_plain
        try:
            return self._behind_line_break(piece.text) if continues else self._encode(piece.text)
        finally:
            self.backend.encode_special_tokens = False

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _behind_line_break(self, text: str) -> list[int]:
        line_break, ids = self._encode("\n"), self._encode(f"\n{text}")
        if ids[: len(line_break)] != line_break:
            raise UserError("the tokenizer joins a line break with what follows it: a text cannot be cut for it")
        return ids[len(line_break) :]
