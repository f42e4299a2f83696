"""Measures how fast this machine multiplies matrices: the ceiling of which benchmarks.bench shows each stack's share.

python -m benchmarks.ceiling        # prints FLOPs per second: 16-bit with fp32 sums on a GPU, fp32 on a CPU
"""

import sys
import time

import torch

from common.machine.device import this_machine


def measure_matmul(repeats: int = 20, size: int | None = None) -> float:
    """The FLOPs per second of large square matmuls.

    On a GPU that of `repeats` in a row, by the GPU's own clock, after as many that warm it up: a card is slower when it
    works without a break. On a CPU, which others may use meanwhile, that of the fastest.
    """
    machine = this_machine()
    size = size or (8192 if machine.is_gpu else 1024)
    a, b = (torch.randn(size, size, device=machine.device, dtype=machine.dtype) for _ in range(2))
    if machine.is_gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for number in range(2 * repeats):
            if number == repeats:
                start.record()
            torch.mm(a, b)
        end.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(end) / 1e3 / repeats
    else:
        seconds = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            torch.mm(a, b)
            seconds = min(seconds, time.perf_counter() - started)
    return 2 * size**3 / seconds


if __name__ == "__main__":
    print(f"{measure_matmul(100 if torch.cuda.is_available() else 20):.4g}")
    sys.exit(0)
