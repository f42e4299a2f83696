"""What an optimizer step takes of a card, counted before any download, and the fastest way to run it that fits.

1. `fake_model` builds three or four layers of the recipe's own model on fake tensors: shapes without data.
2. `count` runs one optimizer step on them; the `ledger` writes down every allocation, release and operator.
3. `splice` repeats the middle layer up to the model's depth, which gives the `step` of the whole model to the byte.
4. `forecast` does 1 to 3 for any policy and number of tokens, and `speed` says how long the step takes.
5. `planner` searches the fastest option that fits the `card`; `misfit` explains why none does.

Then `plan` and `machine_plan` make the plan of a run, `report`, `report_json` and `picture` what `make plan` shows.

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
