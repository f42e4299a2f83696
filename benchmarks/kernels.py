"""Times the forms in which an operator can be written beside each other; common/kernels has the faster one.

    python -m benchmarks.kernels            # shapes of Llama 3 8B on a GPU, small ones on a CPU

LoRA can join the frozen matmul in three ways:

- after it: clone, scale, add, as PEFT does;
- before it: the matmul accumulates into the LoRA branch (`addmm_`), as common.kernels.lora_linear does;
- inside it, as `rank` more columns of the inner size: x beside x A^T, W beside scale * B. Timed with the copies that
  this takes, and at best, as if both were laid out so already.

Then each operator is timed beside its PyTorch reference and liger-kernel, where that is installed: on a GPU by its own
clock and with a cold L2 cache. Results go to benchmarks/results/kernels_<machine>.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from benchmarks.results_folder import result_path
from common.kernels import REFERENCES, cross_entropy, nf4_dequantize, rms_norm, rope, swiglu
from common.machine.device import this_machine

RANK = 16
LLAMA = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
SMALL = {"q, o": (192, 192), "gate, up": (192, 512), "down": (512, 192)}
SHAPES = {"llama": LLAMA, "small": SMALL}
LAUNCH_CYCLES = 20_000_000  # of the GPU's clock, about 10 ms: an operator of several kernels is launched in less than 1


def microseconds(run: Callable[[], Any], repeats: int) -> float:
    """Of one run: the median of `repeats`, after three that warm up; on a GPU the GPU's time, with a cold cache."""
    for _ in range(3):
        run()
    times = gpu_times(run, repeats) if torch.cuda.is_available() else cpu_times(run, repeats)
    return 1e6 * sorted(times)[repeats // 2]


def gpu_times(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each run by the GPU's own clock: what its kernels take, not how long Python needs to launch them.

    Before each run the GPU is kept busy until Python has queued all of it, and a buffer is written that is twice as
    large as the L2 cache: in a step other layers have been through the cache since.
    """
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(2 * repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(LAUNCH_CYCLES)
        flush.zero_()
        start.record()
        run()
        end.record()
        queued = not start.query()  # the GPU is not there yet: nothing of the run waited for Python
        torch.cuda.synchronize()
        if queued:
            times.append(start.elapsed_time(end) / 1e3)
        if len(times) == repeats:
            return times
    raise RuntimeError("an operator waits for the GPU, or Python launches it too slowly for LAUNCH_CYCLES")


def cpu_times(run: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def lora_forms(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], Tensor]]:
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
    a = torch.randn(RANK, inputs, device=device, dtype=dtype) / inputs**0.5
    b = torch.randn(outputs, RANK, device=device, dtype=dtype)
    wide_x, wide_weight = torch.cat((x, x @ a.t()), 1), torch.cat((weight, b), 1)
    return {
        "frozen matmul alone": lambda: x @ weight.t(),
        "after, clone and add": lambda: (x @ weight.t()).clone() + ((x @ a.t()) @ b.t()) * 1.0,
        "before, addmm_": lambda: ((x @ a.t()) @ b.t()).addmm_(x, weight.t()),
        "inside, with copies": lambda: torch.cat((x, x @ a.t()), 1) @ torch.cat((weight, b), 1).t(),
        "inside, at best": lambda: (x @ a.t(), wide_x @ wide_weight.t())[1],
    }


def operator_forms(
    tokens: int, small: bool, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yields operator, implementation, and a function that runs it."""
    hidden, inner, heads, key_heads, dim = (192, 512, 4, 2, 48) if small else (4096, 14336, 32, 8, 128)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, weight, gate, up, grad = random(tokens, hidden), random(hidden), *(random(tokens, inner) for _ in range(3))
    query, key, cos, sin = (
        random(tokens, heads * dim),
        random(tokens, key_heads * dim),
        *(random(tokens, dim) for _ in "cs"),
    )
    packed, state = bnb.quantize_4bit(random(inner, hidden), blocksize=64, compress_statistics=True, quant_type="nf4")
    scales = state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset
    logits = random(min(tokens, 512), 512 if small else 128_256)  # a tile of the loss, whatever the tokens
    targets = torch.zeros(len(logits), device=device, dtype=torch.int64)
    arguments: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "rms_norm": (rms_norm.rms_norm_forward, (x, weight, 1e-5)),
        "rms_norm_backward": (rms_norm.rms_norm_backward, (x, x, weight, 1e-5, x)),
        "rope": (rope.rotate, (query, key, cos, sin, False)),
        "swiglu": (swiglu.swiglu, (gate, up)),
        "swiglu_backward_": (swiglu.swiglu_backward_, (grad, gate, up)),
        "nf4_dequantize": (nf4_dequantize.nf4_dequantize, (packed, *scales, (inner, hidden), dtype)),
        "cross_entropy_": (cross_entropy.cross_entropy_, (logits, targets, 1.0)),
    }
    for name, (operator, values) in arguments.items():
        yield name, "ours", partial(operator, *values)
        yield name, "reference", partial(REFERENCES[operator], *values)
    if device == "cpu":  # liger's are Triton kernels
        return
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction
    except ImportError:
        print("liger-kernel is not installed: left out")
        return
    yield "rms_norm", "liger", lambda: LigerRMSNormFunction.apply(x, weight, 1e-5)
    yield "swiglu", "liger", lambda: LigerSiLUMulFunction.apply(gate, up)
    shaped = [states.view(1, tokens, -1, dim).transpose(1, 2) for states in (query, key)]
    yield "rope", "liger, in place", lambda: LigerRopeFunction.apply(*shaped, cos[None], sin[None])


def main() -> int:
    machine = this_machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096] if machine.is_gpu else [256])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="folder of the .json")
    parser.add_argument("--shapes", choices=SHAPES, default="llama" if machine.is_gpu else "small")
    args = parser.parse_args()
    device, shapes = machine.device.type, SHAPES[args.shapes]
    found: list[dict[str, Any]] = []

    def measure(entry: dict[str, Any], run: Callable[[], Any]) -> None:
        try:
            entry["microseconds"] = microseconds(run, args.repeats)
            said = f"{entry['microseconds']:10,.1f} us"
        except RuntimeError as error:  # of one form; the others are still worth their times
            entry["failed"] = said = str(error)
        found.append(entry)
        print(f"{entry['tokens']:6,}  {entry['what']:24} {entry['form']:22} {said}", flush=True)

    for tokens in args.tokens:
        for shape, (inputs, outputs) in shapes.items():
            for form, run in lora_forms(tokens, inputs, outputs, machine.dtype, device).items():
                measure({"tokens": tokens, "what": f"LoRA linear, {shape}", "form": form}, run)
        for name, form, run in operator_forms(tokens, args.shapes == "small", machine.dtype, device):
            measure({"tokens": tokens, "what": name, "form": form}, run)
    report = {"date": date.today().isoformat(), "machine": str(machine), "torch": torch.__version__, "times": found}
    result_path("kernels", args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any("failed" in entry for entry in found) else 0


if __name__ == "__main__":
    sys.exit(main())
