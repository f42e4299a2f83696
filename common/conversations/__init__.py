"""From a row in any accepted format to a conversation, or to plain text.

Not here: files (common.sources), and tokenizers and their templates (common.tokens).
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.conversations.conversation import Conversation, Message
    from common.conversations.row_reader import RowReader

_MODULE_OF = {
    "Conversation": "conversation",
    "Message": "conversation",
    "RowReader": "row_reader",
}
__all__ = ["Conversation", "Message", "RowReader"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
