"""From sources to packed rows of token ids and labels, and to micro-batches.

Not here: anything that knows a model; the tokenizer is an argument. What a run evaluates and samples is in common.run.
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.data.rows import Rows, load_rows

_MODULE_OF = {
    "Rows": "rows",
    "load_rows": "rows",
}
__all__ = ["Rows", "load_rows"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
