"""`make export`: writes GGUF files, of the merged model or of the adapter alone, and what ollama needs."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from common.commands.flags import BASES, add_target_flags, require_choice
from common.commands.merge import describe_peak
from common.machine.disk import MADE_FROM, format_bytes, refuse_target, write_checked_aside
from common.recipe import Recipe
from common.run.folder import refuse_inside

if TYPE_CHECKING:  # torch takes seconds to import; the commands import it when they run
    from common.adapter.find import TrainedAdapter

EXPORT_FORMATS = ("gguf", "lora", "ollama")
QUANTS = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
MAX_OLLAMA_CONTEXT = 8192  # tokens that an ollama model makes room for, where it has as many positions


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    add_target_flags(parser)
    parser.add_argument("--format", default="gguf", help=f"one of {', '.join(EXPORT_FORMATS)}")
    parser.add_argument("--quant", default="q8_0", help=f"one of {', '.join(QUANTS)}")


def run_export(recipe: Recipe, flags: argparse.Namespace) -> None:
    """Writes what --format names. Raises UserError for another value, and for what GGUF or ollama cannot express."""
    require_choice(flags.format, EXPORT_FORMATS, "FORMAT")
    require_choice(flags.quant, QUANTS, "QUANT")
    require_choice(flags.base, BASES, "BASE")
    name = Path(recipe.out).name
    default = {
        "gguf": Path(f"{recipe.out}-gguf") / _file_name(name, flags),
        "lora": Path(f"{recipe.out}-gguf") / f"{name}-lora.gguf",
        "ollama": Path(f"{recipe.out}-ollama"),
    }
    target = flags.to or default[flags.format]
    refuse_inside(target, recipe.out, "TO")
    refuse_target(target, folder=flags.format == "ollama", overwrite=flags.overwrite)
    print(f"reading the adapter in {recipe.out}", flush=True)
    from common.adapter.find import find_adapter

    write = _write_lora if flags.format == "lora" else _write_model
    write(find_adapter(recipe), target, name, flags)


def _file_name(name: str, flags: argparse.Namespace) -> str:
    return f"{name}-{flags.quant}.gguf"


def _write_model(adapter: "TrainedAdapter", target: Path, name: str, flags: argparse.Namespace) -> None:
    """Writes the merged model: a GGUF file, or for ollama a folder with one and its Modelfile."""
    from common.adapter.gguf import GgufModel
    from common.adapter.load import trained_tokenizer
    from common.adapter.merge import MergedWeights
    from common.adapter.ollama import build_modelfile, lost_in_modelfile, ollama_name
    from common.model.rope_scaling import usable_positions

    weights, tokenizer = MergedWeights(adapter, original=flags.base == "original"), trained_tokenizer(adapter)
    model = GgufModel(weights, tokenizer, name, flags.quant)
    for_ollama = flags.format == "ollama"
    file = _file_name(ollama_name(name), flags)
    if for_ollama:  # before the weights are merged: a template that ollama cannot express is refused here
        context = min(MAX_OLLAMA_CONTEXT, usable_positions(weights.config))
        modelfile = build_modelfile(file, tokenizer, model.generation, context)
    notes = [*model.vocabulary.rules.notes, *lost_in_modelfile(model.generation)] if for_ollama else model.notes
    for note in notes:
        print(f"note: {note}", flush=True)
    with write_checked_aside(target, model.size, folder=for_ollama, overwrite=flags.overwrite) as path:
        print(f"merging into {weights.describe_base()}, {format_bytes(model.size)}", flush=True)
        model.write(path / file if for_ollama else path)
        if for_ollama:
            (path / "Modelfile").write_text(modelfile, encoding="utf-8")
            weights.write_made_from(path / MADE_FROM)
    print(f"the merged model is in {target}; {describe_peak()}")
    if for_ollama:
        modelfile_path = shlex.quote(str(target / "Modelfile"))
        print(f"ollama create {ollama_name(name)} -f {modelfile_path} && ollama run {ollama_name(name)}")


def _write_lora(adapter: "TrainedAdapter", target: Path, name: str, flags: argparse.Namespace) -> None:
    """Writes a GGUF file of the adapter alone."""
    from common.adapter.gguf import write_adapter
    from common.model.config import load_config
    from common.run.folder import ADAPTER_WEIGHTS

    size = (adapter.folder / ADAPTER_WEIGHTS).stat().st_size
    with write_checked_aside(target, size, folder=False, overwrite=flags.overwrite) as path:
        write_adapter(adapter, load_config(adapter.recipe.model), path, name)
    print(f"the adapter alone is in {target}, to be used with a GGUF of {adapter.recipe.model.name}")
