"""Our k-quants beside llama.cpp's own: the error of each on the same values, and the time.

    python -m benchmarks.k_quants [--weights FILE.safetensors ...] [--json FILE]

Values are normal noise, noise with heavy tails, and the linear weights of a safetensors file. llama.cpp's quantizer is
the function that its tool calls (ggml_quantize_chunk), in the library of the xllamacpp package, without an importance
matrix. Prints a table in Markdown, and writes benchmarks/results/k_quants_cpu.json.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quant_shape_to_byte_shape
from safetensors import safe_open
from torch import Tensor

from benchmarks.results_folder import result_path, write_result
from common.adapter.k_quants import K_BLOCK, K_QUANTS, quantize_k

NOISE_SHAPE = (1024, 4096)  # a key projection of Llama 3 8B


def llama_cpp_quantize(values: Tensor, kind: Kind) -> npt.NDArray[np.uint8]:
    """The bytes that llama.cpp makes of values (rows, columns): uint8 (rows, bytes of a row)."""
    import xllamacpp  # type: ignore[import-untyped]

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    source = np.ascontiguousarray(values.float().numpy())
    packed = np.zeros(quant_shape_to_byte_shape(tuple(values.shape), kind), np.uint8)
    size = quantize(int(kind), source.ctypes.data, packed.ctypes.data, 0, *values.shape, None)
    assert size == packed.nbytes
    return packed


def relative_error(packed: npt.NDArray[np.uint8], kind: Kind, values: Tensor) -> float:
    """Root mean square of the error over that of the values."""
    error = torch.from_numpy(dequantize(packed, kind)).double() - values.double()
    return float(error.square().mean().sqrt() / values.double().square().mean().sqrt())


def values_of(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(0)
    yield "normal noise", torch.randn(NOISE_SHAPE) * 0.02
    yield "noise with heavy tails (Student's t, 4)", torch.distributions.StudentT(4.0).sample(NOISE_SHAPE) * 0.02
    for file in files:
        with safe_open(file, "pt") as stored:
            names = [name for name in stored.keys() if "_proj" in name]  # noqa: SIM118
            tensors = [tensor for name in names if (tensor := stored.get_tensor(name)).shape[-1] % K_BLOCK == 0]
        yield (
            f"{len(tensors)} linear weights of {file.parent.name}",
            torch.cat([t.reshape(-1, K_BLOCK) for t in tensors]),
        )


def compare(label: str, values: Tensor, kind: Kind) -> dict[str, Any]:
    row: dict[str, Any] = {"values": label, "kind": kind.name, "count": values.numel()}
    for name, quantize in (("ours", quantize_k), ("llama.cpp", llama_cpp_quantize)):
        started = time.perf_counter()
        packed = quantize(values, kind)
        row[f"{name}, seconds"] = round(time.perf_counter() - started, 2)
        row[name] = relative_error(packed, kind, values)
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="*", type=Path, default=[], metavar="FILE")
    parser.add_argument("--json", type=Path, default=result_path("k_quants"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [compare(label, values, kind) for label, values in values_of(args.weights) for kind in K_QUANTS]
    write_result({"date": date.today().isoformat(), "threads": 1, "rows": rows}, args.json)
    print(
        "| values | format | error, ours | error, llama.cpp | seconds | seconds, llama.cpp |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        times = f"{row['ours, seconds']:.2f} | {row['llama.cpp, seconds']:.2f}"
        print(f"| {row['values']} | {row['kind']} | {row['ours']:.2%} | {row['llama.cpp']:.2%} | {times} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
