"""What the lean layers compute with, made once an optimizer step instead of at each use.

A use of an adapter takes casts to the dtype of the compute, a product with its scale, and a concatenation with those of
the layers beside it. Between two updates of the optimizer the results are always the same. So the trainer says when
nothing changes: from `hold` to `release` they are made once and kept. Outside of that each use reads the adapters as
they are: evaluation, generation, the base without its adapter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from common.kernels.lora_linear import AdapterCopies, LoraLinear, copy_adapters


def read_lora_linear(module: Any) -> LoraLinear:
    """The module's weights and the adapter that is active now, in the form that common.kernels takes."""
    base = module.base_layer if isinstance(module, LoraLayer) else module
    quant_state = getattr(base, "quant_state", None)  # a weight that FSDP2 has gathered has none of its own
    if base is module or module.disable_adapters:
        return LoraLinear(base.weight, base.bias, quant_state=quant_state)
    (name,) = module.active_adapters
    adapter = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    return LoraLinear(base.weight, base.bias, *adapter, quant_state)


@dataclass(frozen=True)
class _Group:
    """Linear modules with a common input, and copies of their adapters with what these were made of."""

    modules: tuple[Any, ...]
    linears: list[LoraLinear]
    copies: AdapterCopies
    dtype: torch.dtype
    adapters: tuple[Tensor, ...]
    versions: tuple[int, ...]  # how often each was changed in place, where torch counts it
    disabled: tuple[bool, ...]

    @classmethod
    def read(cls, modules: tuple[Any, ...], dtype: torch.dtype) -> "_Group":
        linears = [read_lora_linear(module) for module in modules]
        adapters = tuple(tensor for linear in linears for tensor in (linear.a, linear.b) if tensor is not None)
        versions = tuple(tensor._version for tensor in adapters)
        copies = copy_adapters(linears, dtype)
        return cls(modules, linears, copies, dtype, adapters, versions, cls._disabled(modules))

    @staticmethod
    def _disabled(modules: tuple[Any, ...]) -> tuple[bool, ...]:
        return tuple(getattr(module, "_disable_adapters", False) for module in modules)

    def is_valid(self, dtype: torch.dtype) -> bool:
        """Whether copies that are held are still right, as far as torch counts changes.

        A last line of defence: fused AdamW and bitsandbytes' optimizers change tensors and do not count it.
        """
        return (
            self.dtype == dtype
            and tuple(tensor._version for tensor in self.adapters) == self.versions
            and self._disabled(self.modules) == self.disabled
        )


class HeldAdapters:
    """The adapters of all lean layers of a model, in the form that their matmuls take.

    Between `hold` and `release` nobody changes adapters, or which of them is active. The copies take as many bytes as
    the adapters have in the dtype of the compute.
    """

    def __init__(self) -> None:
        self.holds = self.keeps_copies = False
        self.supported: set[nn.Module] = set()  # layers whose linear modules were looked at since `hold`
        self._groups: dict[tuple[nn.Module, str], _Group] = {}

    def hold(self, *, copies: bool = True) -> None:
        """Keeps what is made from now on. copies=False keeps no copies: they would be of whole layers beside shards."""
        self.release()
        self.holds, self.keeps_copies = True, copies

    def release(self) -> None:
        """Frees the copies; from now on each use reads the adapters as they are."""
        self.holds = self.keeps_copies = False
        self.supported.clear()
        self._groups.clear()

    def read(self, parent: nn.Module, names: str, dtype: torch.dtype) -> tuple[list[LoraLinear], AdapterCopies | None]:
        """Linear modules of `parent` that have a common input, and copies of their adapters where they are held.

        names: with a space between two of them. dtype: of the compute.
        """
        if not self.keeps_copies:
            return [read_lora_linear(getattr(parent, name)) for name in names.split()], None
        group = self._groups.get((parent, names))
        if group is None or not group.is_valid(dtype):
            modules = tuple(getattr(parent, name) for name in names.split())
            group = self._groups[parent, names] = _Group.read(modules, dtype)
        return group.linears, group.copies

    def tensors(self, parent: nn.Module | None = None) -> list[Tensor]:
        """The copies that are held; of the modules of `parent` alone where it is given."""
        copies = [group.copies for (module, _), group in self._groups.items() if parent in (None, module)]
        return [tensor for made in copies for tensor in (made.a, *made.b) if tensor is not None]


def held_adapters(model: nn.Module) -> HeldAdapters:
    """Those of a model with lean layers; of another one such that nobody reads."""
    found = (held for module in model.modules() if isinstance(held := getattr(module, "held", None), HeldAdapters))
    return next(found, HeldAdapters())
