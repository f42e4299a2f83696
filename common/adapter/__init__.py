"""What a user does with the adapter that a run left: load it, chat with it, merge it, export it.

Not here: evaluation and the report, which a run makes itself (common.run).
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.adapter.find import TrainedAdapter, find_adapter
    from common.adapter.load import load_trained, trained_tokenizer

_MODULE_OF = {
    "TrainedAdapter": "find",
    "find_adapter": "find",
    "load_trained": "load",
    "trained_tokenizer": "load",
}
__all__ = ["TrainedAdapter", "find_adapter", "load_trained", "trained_tokenizer"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
