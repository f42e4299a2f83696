"""Answers that are better and worse as tokens: a pair is one example of two conversations, chosen and rejected."""

from collections.abc import Sequence

from common.conversations.conversation import AnyExample, Conversation, Preference
from common.data.packing import TooLong
from common.sources.source_row import BadRow
from common.tokens.chat_format import Tokens


def parts_to_encode(example: AnyExample) -> Sequence[Conversation | str]:
    """What of an example is tokenised, each by itself."""
    return example.conversations if isinstance(example, Preference) else [example]


def join_answers(example: AnyExample, encoded: Sequence[Tokens | BadRow]) -> Tokens:
    """Returns an example's tokens. encoded: those of parts_to_encode.

    Raises BadRow where one of them is, where an answer of a pair or a rated one cannot be trained, and where the chat
    template writes the two of a pair the same, or behind different prompts.
    """
    found = []
    for tokens in encoded:
        if isinstance(tokens, BadRow):
            raise tokens
        found.append(tokens)
    if not isinstance(example, Preference):
        return found[0]
    for conversation, tokens in zip(example.conversations, found, strict=True):
        answers = sum(message.role == "assistant" and message.is_trained for message in conversation.messages)
        if len(tokens.turn_ends) < answers:
            raise BadRow(f"an answer cannot be trained, and it counts whole: {'; '.join(tokens.notes)}")
    if len({tuple(tokens.input_ids) for tokens in found}) < len(found):
        raise BadRow("its two answers are the same, as the chat template writes them")
    if len({tuple(tokens.prompt()) for tokens in found}) > 1:
        raise BadRow(
            "the chat template asks for its two answers with different prompts, as where one has thoughts and the "
            "other has none"
        )
    lengths = tuple(len(tokens.input_ids) for tokens in found)
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return Tokens(
        [index for tokens in found for index in tokens.input_ids],
        [label for tokens in found for label in tokens.labels],
        [start + end for start, tokens in zip(starts, found, strict=True) for end in tokens.turn_ends],
        tuple(dict.fromkeys(note for tokens in found for note in tokens.notes)),
        lengths,
        example.signs,
    )


def require_room(tokens: Tokens, seq_len: int) -> list[Tokens]:
    """Returns the example. Raises TooLong where it is longer than a row: no answer is cut, and no pair parted."""
    if len(tokens.input_ids) > seq_len:
        what = "its two answers, each with the prompt, have" if len(tokens.lengths) > 1 else "it has"
        raise TooLong(f"{what} more than {seq_len:,} tokens (TrainSpec.seq_len)")
    return [tokens]
