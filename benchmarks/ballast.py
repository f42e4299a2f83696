"""Allocates GPU memory until only so much is free, and holds it: other processes see a large card as one of 24 GiB.

python -m benchmarks.ballast --leave-gib 24        # prints "ready", then holds the memory until its input is closed
"""

import argparse
import sys

import torch

GIB = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leave-gib", type=float, required=True)
    args = parser.parse_args()
    torch.cuda.init()
    blocks = []
    for size in (1 << 30, 1 << 26, 1 << 22):  # ever smaller, to end close to --leave-gib
        while torch.cuda.mem_get_info()[0] - size >= args.leave_gib * GIB:
            blocks.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    print(f"ready: {torch.cuda.mem_get_info()[0] / GIB:.2f} GiB free", flush=True)
    sys.stdin.read()  # returns when the process at the other end closes the pipe, or ends
    return 0


if __name__ == "__main__":
    sys.exit(main())
