"""What an optimizer step takes of a card, counted on fake tensors, and the fastest way to run it that fits.

Not here: doing what the plan says (common.model does), and measuring it (benchmarks.memory).
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.plan.machine_plan import plan_for_card
    from common.plan.plan import Plan

_MODULE_OF = {
    "Plan": "plan",
    "plan_for_card": "machine_plan",
}
__all__ = ["Plan", "plan_for_card"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
