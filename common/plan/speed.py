"""A roofline model of time: what a part of the step does, and how long a card takes for it."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from common.recipe import require


@dataclass
class Work:
    """What a part of the step does."""

    operators: list[tuple[float, float]] = field(default_factory=list)  # FLOP of its matmuls, bytes it reads and writes
    link_bytes: float = 0.0  # to and from the host, and from other cards
    launches: int = 0  # operators that Python starts

    @cached_property
    def table(self) -> np.ndarray:
        """The operators as float64 (operators, 2). Ask for it when they are all there."""
        return np.array(self.operators, dtype=np.float64).reshape(-1, 2)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.operators)

    def scaled(self, factor: float) -> "Work":
        operators = [(flops * factor, size * factor) for flops, size in self.operators]
        return Work(operators, self.link_bytes * factor, int(self.launches * factor))


@dataclass(frozen=True)
class Speed:
    """The speeds of a machine that the time of a step depends on."""

    name: str
    flops_per_second: float  # dense 16-bit matmul with fp32 sums, by the data sheet
    memory_bytes_per_second: float  # of the GPU's memory, by the data sheet
    # Each way, to the host and to other cards. PCIe 4.0 x16 moves about 25 of its 32 GB/s.
    link_bytes_per_second: float = 25e9
    # The share of each that a training step reaches.
    matmul_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    # Of Python and torch's dispatcher, an operator: benchmarks/results/launch_cpu.json, forward and backward of a layer
    # that keeps its activations (one that recomputes: 17e-6), on an AMD EPYC. The driver's launch is not in it.
    launch_seconds: float = 12e-6

    def seconds(self, work: Work) -> float:
        """The slowest of three that run side by side: the operators, the copies over the link, and the launches.

        An operator takes as long as its matmul or its memory traffic, whichever is longer.
        """
        matmul = self.flops_per_second * self.matmul_efficiency
        memory = self.memory_bytes_per_second * self.memory_efficiency
        operators = float((work.table / (matmul, memory)).max(axis=1).sum())
        return max(operators, work.link_bytes / self.link_bytes_per_second, work.launches * self.launch_seconds)


@dataclass(frozen=True, kw_only=True)
class KnownGpu(Speed):
    """A kind of GPU that can be planned for on any machine: its speeds, and what else its plan depends on."""

    memory_gib: float  # of the whole card, as CUDA reports it
    capability: tuple[int, int]  # CUDA compute capability, which says whether it has bf16 and flash attention


# Dense bf16 (T4: fp16) matmul with fp32 sums, and memory bandwidth, by NVIDIA's data sheets (GeForce: the architecture
# white papers AD102, GA102 and Blackwell RTX, appendix A). The efficiencies are from steps that others measured. Seven
# of QLoRA, LoRA and bf16 LoRA on an A100 (foundation-model-stack/fms-acceleration, scripts/benchmarks/refs) lie within
# 2 % of 78.5 % of the matmuls and 68 % of the memory traffic. An RTX 4090 and a 3090 (AnswerDotAI/fsdp_qlora,
# benchmarks_03_2024.md) take 1.02 and 1.1 times as long as the model says without any. 80 % of an H200's matmuls, 790
# TFLOP/s, were measured by others and are taken for the H100 too, as is the A100's 68 % for both. Of the other cards no
# efficiency is known. A100 and H100 are those of 80 GB on SXM boards.
# The memory is the smallest total that people have posted of the card with torch's out-of-memory errors, 2024 to 2026:
# drivers differ by up to 0.2 GiB, and all of them keep some of what is printed on the box. The capability is NVIDIA's
# (developer.nvidia.com/cuda-gpus).
KNOWN_GPUS = (
    KnownGpu("RTX 4090", 165e12, 1.01e12, memory_gib=23.5, capability=(8, 9)),
    KnownGpu("RTX 3090", 71e12, 0.94e12, memory_gib=23.5, capability=(8, 6)),
    KnownGpu("RTX 5090", 209.5e12, 1.79e12, memory_gib=31.3, capability=(12, 0)),
    KnownGpu(
        "A100", 312e12, 2.04e12, memory_gib=79.1, capability=(8, 0), matmul_efficiency=0.785, memory_efficiency=0.68
    ),
    KnownGpu(
        "H100", 989e12, 3.35e12, memory_gib=79.1, capability=(9, 0), matmul_efficiency=0.8, memory_efficiency=0.68
    ),
    KnownGpu(
        "H200", 989e12, 4.8e12, memory_gib=139.7, capability=(9, 0), matmul_efficiency=0.8, memory_efficiency=0.68
    ),
    KnownGpu("L40S", 362e12, 0.864e12, memory_gib=44.3, capability=(8, 9)),
    KnownGpu("L4", 121e12, 0.3e12, memory_gib=22.0, capability=(8, 9)),
    KnownGpu("T4", 65e12, 0.32e12, memory_gib=14.5, capability=(7, 5)),
)


def speed_of(gpu: str | None) -> KnownGpu:
    """The speed of a GPU by its name. An unknown one counts as the first: a plan compares ratios of times only."""
    return next((known for known in KNOWN_GPUS if gpu and re.search(rf"\b{known.name}\b", gpu)), KNOWN_GPUS[0])


def named_gpu(typed: str | None) -> KnownGpu | None:
    """The kind of GPU that is meant by "t4", "RTX 4090", "rtx-4090" or "4090".

    None for nothing, and for the number of one of this machine. Raises UserError for a kind that is not known.
    """
    if typed is None:
        return None
    for known in KNOWN_GPUS:
        if _letters(typed).removeprefix("rtx") == _letters(known.name).removeprefix("rtx"):
            return known
    there = ", ".join(f"{known.name.lower().replace(' ', '-')} ({known.memory_gib:g} GiB)" for known in KNOWN_GPUS)
    require(
        typed.isdecimal(),
        f"GPU={typed}: a plan knows {there}. CARD_GIB=16 plans for any other card that has bf16; a number from 0 on is "
        "a GPU of this machine",
    )
    return None


def _letters(name: str) -> str:
    """Of a GPU's name what tells it from others, however it is written."""
    return re.sub(r"nvidia|geforce|tesla|[\W_]", "", name.lower())


# FLOP per second of dense bf16 matmul with fp32 sums by NVIDIA's data sheets and architecture papers; fp16 for the T4,
# which has no bf16, and half of a rate that a sheet shows "with sparsity". By the names that CUDA gives to whole cards:
# a laptop's RTX 4090, a slice of a card (MIG) and a card that is not here have none.
DATA_SHEET_FLOPS = {
    r"H100 80GB HBM3|H200": 989.4e12,
    r"H100 NVL|H200 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": 312e12,
    r"L40S": 362e12,
    r"L4": 121e12,
    r"T4": 65e12,
    r"RTX 5090": 209.5e12,
    r"RTX 4090": 165.2e12,
    r"RTX 3090": 71e12,
}


def data_sheet_flops(gpu: str) -> float | None:
    """FLOP per second of 16-bit matmul that the GPU's data sheet promises, by its name in CUDA; None if not known."""
    name = re.sub(r"^((NVIDIA|Tesla|GeForce) )*", "", gpu)
    return next((flops for pattern, flops in DATA_SHEET_FLOPS.items() if re.fullmatch(pattern, name)), None)
