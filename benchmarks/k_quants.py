"""Our k-quants beside llama.cpp's own: the error of each on the same values, and the time.

    python -m benchmarks.k_quants [--weights FILE.safetensors ...] [--json FILE]
    python -m benchmarks.k_quants --kl MERGED f16.gguf q4_k_m.gguf ... [--json FILE]

Values are normal noise, noise with heavy tails, and the linear weights of a safetensors file. llama.cpp's quantizer is
the function that its tool calls (ggml_quantize_chunk), in the library of the xllamacpp package, without an importance
matrix. Prints a table in Markdown, and writes benchmarks/results/k_quants_cpu.json.

With --kl it adds to that file how far a model is moved: the KL in nats a token from the first GGUF file, and how often
the likeliest token is the same, over texts of data/general.jsonl. MERGED is the folder of make merge; the GGUF files
are make export's of the same run, of Llama's architecture.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quant_shape_to_byte_shape
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.results_folder import read_result, result_path, write_result
from common import REPOSITORY
from common.adapter.gguf import gguf_names
from common.adapter.gguf_dimensions import GEMMA
from common.adapter.k_quants import K_BLOCK, K_QUANTS, quantize_k
from common.machine.disk import MADE_FROM
from common.model.architectures import ARCHITECTURES

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


def read_gguf(path: Path, model: Any) -> set[str]:
    """Gives the model's parameters the values of the file, all of which it needs. Returns the tensors' names there."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names, arch = gguf_names(model.config), ARCHITECTURES[model.config.model_type].gguf_name
    read = set()
    for name, parameter in model.named_parameters():  # a tied head is the embedding: named once
        place = names.get_name(name, try_suffixes=(".weight",)) or name
        values = torch.from_numpy(dequantize(stored[place].data, stored[place].tensor_type).copy())
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):  # pairs that are rotated stand side by side
            values = values.view(-1, model.config.head_dim // 2, 2, values.shape[-1]).transpose(1, 2)
        if arch == GEMMA and name.endswith("norm.weight"):
            values = values - 1
        parameter.data.copy_(values.reshape(parameter.shape))
        read.add(place)
    assert read == stored.keys()
    return read


def general_texts(count: int = 40, shortest: int = 60) -> list[str]:
    """The first texts of data/general.jsonl that have so many characters; a conversation as its words in a row."""
    rows = [json.loads(line) for line in (REPOSITORY / "data" / "general.jsonl").read_text("utf-8").splitlines()]
    texts = [row.get("text") or " ".join(message["content"] for message in row.get("messages", ())) for row in rows]
    return [text for text in texts if len(text) >= shortest][:count]


@torch.no_grad()
def measure_kl(merged: Path, files: list[Path]) -> Iterator[dict[str, Any]]:
    """Yields for each GGUF file but the first how far the model with its weights is from that with the first's."""
    base = read_result(merged / MADE_FROM)["base"]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    first, model = (AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval() for _ in range(2))
    read_gguf(files[0], first)
    for file in files[1:]:
        read_gguf(file, model)
        nats, same, tokens = 0.0, 0, 0
        for text in general_texts():
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :128]
            before, after = first(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1)
            nats += float((before.exp() * (before - after)).sum())
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            tokens += ids.numel()
        row = {"file": file.name, "bytes": file.stat().st_size, "tokens": tokens}
        yield row | {"kl": nats / tokens, "same_token": same / tokens, "base": base}


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
    parser.add_argument("--kl", nargs="+", type=Path, metavar="FILE", help="MERGED f16.gguf other.gguf ...")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.kl:
        merged, *files = args.kl
        moved = list(measure_kl(merged, files))
        write_result(read_result(args.json) | {"kl": moved}, args.json)
        for entry in moved:
            same = f"the same token {entry['same_token']:.1%} of {entry['tokens']:,}"
            print(f"{entry['file']}: KL {entry['kl']:.4f}, {same}")
        return 0
    rows = [compare(label, values, kind) for label, values in values_of(args.weights) for kind in K_QUANTS]
    before = read_result(args.json) if args.json.exists() else {}
    write_result(before | {"date": date.today().isoformat(), "threads": 1, "rows": rows}, args.json)
    print(
        "| values | format | error, ours | error, llama.cpp | seconds | seconds, llama.cpp |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        times = f"{row['ours, seconds']:.2f} | {row['llama.cpp, seconds']:.2f}"
        print(f"| {row['values']} | {row['kind']} | {row['ours']:.2%} | {row['llama.cpp']:.2%} | {times} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
