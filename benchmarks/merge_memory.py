"""Measures host memory and time of `make merge` and `make export`, with a base of real dimensions and random weights.

python -m benchmarks.merge_memory llama3-8b /scratch      # 16 GB for the base, as much again for the result
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.models import recipe_of
from benchmarks.results_folder import result_path, write_result
from common.machine.device import GIB
from common.model.config import load_config
from common.model.loading import TINY, load_tokenizer
from common.model.lora import attach_lora
from common.model.safetensors_files import Entry, split_into_files, write_files
from common.recipe import ModelSpec

# A command, run in a process of its own, which prints the peak of its host memory at the end.
RUN_COMMAND = """
import sys
from dataclasses import replace
from benchmarks.models import recipe_of
from common.cli import run_command
from common.recipe import ModelSpec
from common.machine.device import peak_ram
name, base, out, command, *flags = sys.argv[1:]
status = run_command(command, name, replace(recipe_of(name), model=ModelSpec(base), out=out), flags)
print("peak", peak_ram())
sys.exit(status)
"""


def write_base(name: str, folder: Path, layers: int | None) -> int:
    """Writes a 16-bit checkpoint with the recipe's config and random weights, in shards of 5 GB. Returns its bytes."""
    spec = replace(recipe_of(name).model, weights="random", layers=layers)
    config = load_config(spec)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    entries = [Entry(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * config.initializer_range

    def tensor_of(entry: Entry) -> Tensor:
        if entry.name.endswith("norm.weight"):
            return torch.ones(entry.shape)
        size = torch.Size(entry.shape).numel()
        return noise.repeat(-(-size // len(noise)))[:size].view(entry.shape)

    folder.mkdir(parents=True)
    files = split_into_files(entries)
    write_files(folder, files, tensor_of)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / file, folder / file)
    return sum(file.size for file in files)


def write_noise_adapter(name: str, base: Path, folder: Path) -> None:
    """Writes an adapter of the recipe's shape with noise in B, as a run leaves it."""
    spec = ModelSpec(str(base))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(spec), dtype=torch.bfloat16)
    model.config._name_or_path = model.name_or_path = str(base)
    adapted = attach_lora(model, recipe_of(name).lora)
    shapes = {name.replace(".default", ""): p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    folder.mkdir()
    weights = {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in shapes.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapted.peft_config["default"].save_pretrained(folder)
    load_tokenizer(spec).save_pretrained(folder)


def measure(name: str, base: Path, out: Path, command: str, *flags: str) -> dict[str, float | str]:
    """Runs a command of the run in `out`. Returns seconds, peak of host memory in GiB, and the self-check's line."""
    started = time.perf_counter()
    arguments = [sys.executable, "-c", RUN_COMMAND, name, str(base), str(out), command, *flags]
    done = subprocess.run(arguments, capture_output=True, text=True)
    print(done.stdout, done.stderr if done.returncode else "", sep="\n", flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(int(done.stdout.split()[-1]) / GIB, 2),
        "said": next((line for line in done.stdout.splitlines() if line.startswith("self-check: KL")), ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="where there is room")
    parser.add_argument("--layers", type=int, help="of the base (default: all)")
    parser.add_argument("--json", type=Path, help="where to write it (default: benchmarks/results)")
    args = parser.parse_args()
    base, out = args.folder / "base", args.folder / "run"
    result: dict[str, object] = {"model": args.model, "layers": args.layers, "threads": torch.get_num_threads()}
    result["base_bytes"] = write_base(args.model, base, args.layers)
    write_noise_adapter(args.model, base, out)
    result["merge"] = measure(args.model, base, out, "merge")
    shutil.rmtree(f"{out}-merged")
    result["export q8_0"] = measure(args.model, base, out, "export", "--quant", "q8_0")
    for folder in (base, out, Path(f"{out}-gguf")):
        shutil.rmtree(folder)
    path = args.json or result_path(f"merge_{args.model.replace('-', '_')}")
    write_result(result, path)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
