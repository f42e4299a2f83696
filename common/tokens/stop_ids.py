"""Which tokens end an answer: one rule for the run, chat, evaluation, and what merge and export write."""

from transformers import PreTrainedTokenizerFast

from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat


def stop_ids(tokenizer: PreTrainedTokenizerFast, known: int | list[int] | None) -> list[int]:
    """The ids of the tokens that end an answer, sorted: the ends of the template's turns, and those that are known.

    known: eos_token_id of a generation config or a model's config. Where the template ends a turn with no token of its
    own, the known ids are all there is. Raises UserError when there is none.
    """
    ids = set(known if isinstance(known, list) else [known]) - {None}
    try:
        ids |= ChatFormat(tokenizer).end_of_turn_ids()
    except (UserError, BadRow):
        if not ids:
            raise
    return sorted(index for index in ids if index is not None)
