"""From a conversation to token ids and labels, with the model's own tokenizer and chat template.

Not here: anything that knows a model; the tokenizer is an argument. How rows are filled is in common.data.
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.tokens.chat_format import ChatFormat, Tokens

_MODULE_OF = {
    "ChatFormat": "chat_format",
    "Tokens": "chat_format",
}
__all__ = ["ChatFormat", "Tokens"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
