"""Takes memory of the GPU until only so much is free, and holds it: a large card becomes a 24 GiB one for others.

python -m benchmarks.ballast --leave-gib 24        # prints "ready", then waits to be killed
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
    held = []
    for block in (1 << 30, 1 << 26, 1 << 22):  # ever smaller, to end close to the mark
        while torch.cuda.mem_get_info()[0] - block >= args.leave_gib * GIB:
            held.append(torch.empty(block, dtype=torch.uint8, device="cuda"))
    print(f"ready: {torch.cuda.mem_get_info()[0] / GIB:.2f} GiB free", flush=True)
    sys.stdin.read()  # until the other end closes, also by dying
    return 0


if __name__ == "__main__":
    sys.exit(main())
