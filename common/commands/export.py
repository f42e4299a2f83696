"""`make export`: writes GGUF files, of the merged model or of the adapter alone, and what ollama needs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.commands.flags import BASES, add_target_flags, require_choice
from common.commands.merge import describe_peak
from common.machine.disk import MADE_FROM, format_bytes, refuse_existing, written_aside
from common.recipe import Recipe

if TYPE_CHECKING:  # torch takes seconds to import; the commands import it when they run
    from common.adapter.find import TrainedAdapter

EXPORT_FORMATS = ("gguf", "lora", "ollama")
QUANTS = ("f16", "bf16", "q8_0")
MAX_OLLAMA_CONTEXT = 8192  # tokens that an ollama model makes room for, where it has as many positions


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    add_target_flags(parser)
    parser.add_argument("--format", default="gguf", help=f"one of {', '.join(EXPORT_FORMATS)}")
    parser.add_argument("--quant", default="q8_0", help=f"one of {', '.join(QUANTS)}")


def run_export(recipe: Recipe, flags: argparse.Namespace) -> None:
    for value, choices, name in ((flags.format, EXPORT_FORMATS, "FORMAT"), (flags.quant, QUANTS, "QUANT")):
        require_choice(value, choices, name)
    require_choice(flags.base, BASES, "BASE")
    name = Path(recipe.out).name
    file = f"{name}-{flags.quant}.gguf"
    default = {
        "gguf": Path(f"{recipe.out}-gguf") / file,
        "lora": Path(f"{recipe.out}-gguf") / f"{name}-lora.gguf",
        "ollama": Path(f"{recipe.out}-ollama"),
    }
    target, is_folder = flags.to or default[flags.format], flags.format == "ollama"
    refuse_existing(target, folder=is_folder, overwrite=flags.overwrite)
    from common.adapter.find import find_adapter

    adapter = find_adapter(recipe)
    if flags.format == "lora":
        _write_lora(adapter, target, name, overwrite=flags.overwrite)
        return
    from common.adapter.gguf import GgufModel
    from common.adapter.load import trained_tokenizer
    from common.adapter.merge import MergedWeights
    from common.adapter.ollama import modelfile

    weights, tokenizer = MergedWeights(adapter, original=flags.base == "original"), trained_tokenizer(adapter)
    model = GgufModel(weights, tokenizer, name, flags.quant)
    if is_folder:  # before the weights: what ollama has no words for fails here
        context = min(MAX_OLLAMA_CONTEXT, weights.config.max_position_embeddings)
        text = modelfile(file, tokenizer, weights.generation_config(), context)
    with written_aside(target, model.size, folder=is_folder, overwrite=flags.overwrite) as path:
        print(f"merging into {weights.into()}, {format_bytes(model.size)}")
        model.write(path / file if is_folder else path)
        if is_folder:
            (path / "Modelfile").write_text(text, encoding="utf-8")
            weights.write_note(path / MADE_FROM)
    print(f"the merged model is in {target}; {describe_peak()}")
    if is_folder:
        print(f"ollama create {name} -f {target}/Modelfile && ollama run {name}")


def _write_lora(adapter: "TrainedAdapter", target: Path, name: str, *, overwrite: bool) -> None:
    from common.adapter.gguf import write_adapter
    from common.model.files import load_config
    from common.run.folder import ADAPTER_WEIGHTS

    size = (adapter.folder / ADAPTER_WEIGHTS).stat().st_size
    with written_aside(target, size, folder=False, overwrite=overwrite) as path:
        write_adapter(adapter, load_config(adapter.recipe.model), path, name)
    print(f"the adapter alone is in {target}, to be used with a GGUF of {adapter.recipe.model.name}")
