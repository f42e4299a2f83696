"""One run: training, held-out evaluation, checkpoints, resume, what is shown meanwhile and what is left behind.

Not here: what is done with the adapter afterwards (common.adapter).
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.run.evaluation import print_before_after
    from common.run.generation import generate
    from common.run.prompts import load_prompts
    from common.run.recipe_main import story
    from common.run.training import train

_MODULE_OF = {
    "generate": "generation",
    "load_prompts": "prompts",
    "print_before_after": "evaluation",
    "story": "recipe_main",
    "train": "training",
}
__all__ = ["generate", "load_prompts", "print_before_after", "story", "train"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
