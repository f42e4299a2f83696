"""The model that trains: its files and how they load, LoRA, the lean layers, the loss, what recomputes, sharding.

Not here: the operators that the lean layers call (common.kernels), what a step costs (common.plan), the training loop
(common.run).
"""

from typing import TYPE_CHECKING

from common.lazy import lazy_names

if TYPE_CHECKING:
    from common.model.activation_checkpointing import checkpoint_activations
    from common.model.lean_layers import use_lean_layers
    from common.model.loading import load_4bit, load_tokenizer
    from common.model.lora import attach_lora
    from common.model.sharding import shard_layers

_MODULE_OF = {
    "attach_lora": "lora",
    "checkpoint_activations": "activation_checkpointing",
    "load_4bit": "loading",
    "load_tokenizer": "loading",
    "shard_layers": "sharding",
    "use_lean_layers": "lean_layers",
}
__all__ = ["attach_lora", "checkpoint_activations", "load_4bit", "load_tokenizer", "shard_layers", "use_lean_layers"]
__getattr__ = lazy_names(__name__, _MODULE_OF)
