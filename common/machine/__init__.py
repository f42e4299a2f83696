"""What a run runs on: the GPU or CPU, its processes and how they start, the disk, locks, paths, the hub's errors.

Not here: anything that knows a model, a row of data or a plan.
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.machine.device import Machine, this_machine
    from common.machine.layout import Layout

_MODULE_OF = {
    "Layout": "layout",
    "Machine": "device",
    "this_machine": "device",
}
__all__ = ["Layout", "Machine", "this_machine"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
