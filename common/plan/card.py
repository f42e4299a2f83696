"""The memory that a plan may use: of a card, what a step cannot use of it, and of the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from common.machine.device import GIB, Machine, available_ram
from common.machine.processes import local_world_size
from common.plan.speed import KnownGpu
from common.recipe import UserError

# Nothing here was measured by this repository; docs/memory.md has the sources.
# Of a process that trains, beside what torch allocates: the CUDA context with the kernels it has loaded. GiB of the
# card, and bytes up to that size. Others measured 0.22 to 0.40 GiB on an RTX 3090, 0.41 to 0.51 on an RTX 4090, 0.55 on
# an L4, 0.58 to 0.60 on an RTX 5090, 0.95 on a card of 80 GB.
CONTEXT_BYTES = ((24, int(0.55 * GIB)), (48, int(0.6 * GIB)), (math.inf, GIB))
# Of that, kernels: CUDA loads each at its first launch, so a context that is there has few of them yet. Assumed to be
# 150 to 350 MiB in a training step.
KERNEL_BYTES = 350 << 20
# cuBLAS takes 8 blocks of 4,096 KiB (CUBLAS_WORKSPACE_CONFIG, common/process_state.py), once for the forward and once
# for the backward thread; cuBLASLt uses the same (torch.backends.cuda, TORCH_CUBLASLT_UNIFIED_WORKSPACE). Two of them
# are what peaks that others published show.
WORKSPACE_BYTES = 2 * (32 << 20)
# NCCL's buffers and kernels on a card that talks to others: measured on two A100 over NVLink, and taken for PCIe too.
NCCL_BYTES = int(0.54 * GIB)
# Of the card: blocks whose size the allocator cannot use, with expandable segments.
RESERVE_SHARE = 0.03
# Of the available host memory: the data and other programs need some, and what is page-locked cannot be swapped out.
# Assumed, not measured.
HOST_SHARE = 0.8
SAME_SIZE_BITS = 26  # cards that differ by less than 2**26 bytes, 64 MiB, are of one size


@dataclass(frozen=True)
class Card:
    """A card, real or assumed, and the host memory beside it."""

    name: str
    size: int  # bytes: of the card, or what is free of it
    has_context: bool = False  # this process has its CUDA context on the card already
    gpu: str | None = None  # its name, for its speed; None is an RTX 4090
    uses_nccl: bool = False  # it talks to other cards
    # Of a layer that another stream gathers. torch's allocator keeps freed blocks for the stream that took them: they
    # serve no tensor of the step.
    other_stream_bytes: int = 0
    host_bytes: int | None = None  # of host memory that a run may use beside it; None where that is not known
    cards: int = 1  # of the run on its machine, which share that machine's host memory

    @classmethod
    def of_size(cls, gib: float) -> "Card":
        return cls(f"a card of {gib:g} GiB", int(gib * GIB))

    @classmethod
    def of_kind(cls, gpu: KnownGpu, gib: float | None = None) -> "Card":
        """A whole GPU of this kind, of which nothing is used yet. gib: where it has other memory than most."""
        gib = gpu.memory_gib if gib is None else gib
        return cls(f"one {gpu.name} of {gib:g} GiB", int(gib * GIB), gpu=gpu.name)

    @classmethod
    def of_machine(cls, machine: Machine) -> "Card":
        """What is free on this process's GPU, and its share of the available host memory."""
        free = machine.free_bytes()
        ram = available_ram()
        host_bytes = None if ram is None else int(HOST_SHARE * ram) // local_world_size()
        name = f"{free / GIB:.1f} GiB free on {machine.name}"
        cards = local_world_size()
        return cls(name, free, has_context=True, gpu=machine.name, host_bytes=host_bytes, cards=cards)

    def overhead(self) -> dict[str, int]:
        """What the count cannot see and no step can use, in bytes, by name."""
        return {
            "CUDA context": 0 if self.has_context else self._context_bytes() - KERNEL_BYTES,
            "CUDA kernels": KERNEL_BYTES,
            "workspaces": WORKSPACE_BYTES,
            "NCCL": NCCL_BYTES if self.uses_nccl else 0,
            "another stream's layer": self.other_stream_bytes,
            "reserve": int(RESERVE_SHARE * self.size),
        }

    def _context_bytes(self) -> int:
        return next(size for up_to, size in CONTEXT_BYTES if self.size <= up_to * GIB)

    @property
    def overhead_bytes(self) -> int:
        return sum(self.overhead().values())

    @property
    def budget(self) -> int:
        """Bytes that a step may use."""
        return self.size - self.overhead_bytes


def smallest_of(cards: Sequence[tuple[Card, torch.dtype]]) -> Card:
    """The card with the least free memory, which all cards must do with.

    Raises UserError when the cards compute in different number formats.
    """
    if len({dtype for _, dtype in cards}) > 1:
        kinds = ", ".join(f"{card.gpu} in {str(dtype).removeprefix('torch.')}" for card, dtype in cards)
        raise UserError(f"the GPUs do not compute in one number format: {kinds}. Leave out the ones without bf16")
    card, _ = min(cards, key=lambda pair: pair[0].size)
    if len({card.size >> SAME_SIZE_BITS for card, _ in cards}) > 1:
        card = replace(card, name=f"{card.name}, the smallest of {len(cards)} cards")
    return card
