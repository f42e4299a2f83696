"""Shortens what is longer than a row: a conversation at its turns, rendered anew; a plain text into several rows."""

from bisect import bisect_right
from dataclasses import replace

from common.conversations.conversation import AnyExample, Conversation, Preference
from common.data.answers import require_room
from common.data.packing import TooLong, fit_to_row
from common.recipe import LongTexts, TrainOn
from common.tokens.chat_format import ChatFormat, Tokens


def fit_example(
    example: AnyExample,
    tokens: Tokens,
    seq_len: int,
    chat_format: ChatFormat,
    train_on: TrainOn,
    long_texts: LongTexts = "split",
) -> list[Tokens]:
    """Returns what becomes of an example in rows of seq_len tokens. `tokens` are those of the whole.

    Raises BadRow as fit_to_row, fit_conversation and require_room.
    """
    if isinstance(example, Preference):
        return require_room(tokens, seq_len)
    if len(tokens.input_ids) <= seq_len:
        return [tokens]
    if isinstance(example, str):
        is_text = not chat_format.rendered
        if is_text and long_texts == "drop":
            raise TooLong(f"it has more than {seq_len:,} tokens (TrainSpec.seq_len, DataSpec.long_texts)")
        return fit_to_row(tokens, seq_len, is_text=is_text)
    return [fit_conversation(example, seq_len, chat_format, train_on)]


def fit_conversation(conversation: Conversation, seq_len: int, chat_format: ChatFormat, train_on: TrainOn) -> Tokens:
    """Returns the longest beginning of a conversation that fits a row, as a conversation of its own.

    It is rendered anew, because a template may write otherwise what stands last: Mistral's system message stands with
    the last turn of the user, Qwen3's thoughts with the last answer. Raises BadRow when not even the first answer fits.
    """
    messages = conversation.messages

    def begin(count: int) -> Tokens:
        return chat_format.encode(replace(conversation, messages=messages[:count]), train_on)

    def needed(count: int) -> int:
        return begin(count).turn_ends[-1]  # what follows the last end token may be left out

    counts = [i + 1 for i, message in enumerate(messages) if message.role == "assistant" and message.is_trained]
    fitting = bisect_right(counts, seq_len, key=needed)
    (fitted,) = fit_to_row(begin(counts[max(0, fitting - 1)]), seq_len, is_text=False)
    return fitted
