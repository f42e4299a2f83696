"""The embedding of the token that fills micro-batches up."""

from transformers import PreTrainedModel, PreTrainedTokenizerFast


def mend_pad_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Sets the pad token's row of the input embedding to zero where it holds a NaN or an infinity, and says so.

    No text holds that token, and attention gives padding a weight of exactly 0. But 0 times NaN is NaN: such a row
    would reach every token of a row that is filled up. The files of the base stay as they are.
    """
    row = model.get_input_embeddings().weight.detach()[tokenizer.pad_token_id]
    if not row.isfinite().all():
        row.zero_()
        print(f"the embedding of the pad token {tokenizer.pad_token} is no finite number: it counts as zero here")
