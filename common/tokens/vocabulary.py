"""The tokens that a tokenizer can make and its model has no embedding for, where the two do not belong together."""

from transformers import PreTrainedTokenizerFast


def limit_vocabulary(tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    """Tells everything that tokenises with this tokenizer how many rows the model's embedding has."""
    tokenizer.model_vocabulary = size


def vocabulary_limit(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Returns what limit_vocabulary was given; None for a tokenizer without a model."""
    return getattr(tokenizer, "model_vocabulary", None)


def tokens_beyond(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Returns the tokens without a row in the model's embedding: from the id to the text."""
    size = vocabulary_limit(tokenizer)
    return {} if size is None else {index: token for token, index in tokenizer.get_vocab().items() if index >= size}


def describe_beyond(tokenizer: PreTrainedTokenizerFast, index: int) -> str:
    """Returns the token, its id and the limit in words."""
    size = vocabulary_limit(tokenizer)
    return f"{tokenizer.convert_ids_to_tokens(index)} (id {index}), beyond the model's vocabulary of {size:,}"
