"""A roofline model of time: what a part of the step does, and how long a card takes for it."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


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
    flops_per_second: float  # dense 16-bit matmul
    memory_bytes_per_second: float  # of the GPU's memory
    # Each way, to the host and to other cards. PCIe 4.0 x16 moves about 25 of its 32 GB/s.
    link_bytes_per_second: float = 25e9
    # Of Python and torch's dispatcher, an operator: benchmarks/results/launch_cpu.json, forward and backward of a layer
    # that keeps its activations (one that recomputes: 17e-6), on an AMD EPYC. The driver's launch is not in it.
    launch_seconds: float = 12e-6

    def seconds(self, work: Work) -> float:
        """The slowest of three that run side by side: the operators, the copies over the link, and the launches.

        An operator takes as long as its matmul or its memory traffic, whichever is longer.
        """
        operators = float((work.table / (self.flops_per_second, self.memory_bytes_per_second)).max(axis=1).sum())
        return max(operators, work.link_bytes / self.link_bytes_per_second, work.launches * self.launch_seconds)


# Dense bf16 matmul with fp32 sums, and memory bandwidth. Nothing here was measured by this repository. RTX 4090 and
# 3090 are their data sheets. The 790e12 of H100 and H200 is a matmul speed that others measured on an H200 (the data
# sheet says 989e12), taken for the H100 too; their bandwidths are the data sheets'.
SPEEDS = (
    Speed("RTX 4090", 165e12, 1.01e12),
    Speed("RTX 3090", 71e12, 0.94e12),
    Speed("H100", 790e12, 3.35e12),
    Speed("H200", 790e12, 4.8e12),
)


def speed_of(gpu: str | None) -> Speed:
    """The speed of a GPU by its name. An unknown one counts as the first: a plan compares ratios of times only."""
    return next((speed for speed in SPEEDS if gpu and speed.name in gpu), SPEEDS[0])


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
