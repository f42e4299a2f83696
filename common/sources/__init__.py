"""From a file, several of them, or a data set of the hub to rows as they stand there, each with its place.

Not here: what a row means (common.conversations).
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.sources.files import read_rows

_MODULE_OF = {
    "read_rows": "files",
}
__all__ = ["read_rows"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
