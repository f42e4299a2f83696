"""Measures how fast this machine multiplies matrices: the ceiling of which benchmarks.bench shows each stack's share.

python -m benchmarks.ceiling        # prints FLOPs per second: bf16 with fp32 sums on a GPU, fp32 on a CPU
"""

import sys
import time

import torch


def measure_matmul(repeats: int = 20) -> float:
    """The FLOPs per second of the fastest of `repeats` large square matmuls."""
    gpu = torch.cuda.is_available()
    size = 8192 if gpu else 1024
    a, b = (torch.randn(size, size, device="cuda" if gpu else "cpu") for _ in range(2))
    if gpu:
        a, b = a.bfloat16(), b.bfloat16()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    print(f"{measure_matmul():.4g}")
    sys.exit(0)
