"""What a user does with a trained adapter: `python -m recipes chat|eval|merge|export|report NAME`, and their flags."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import exit_status
from common.machine.disk import MADE_FROM, format_bytes, refuse_existing, write_checked_aside
from common.process_state import quiet_libraries
from common.recipe import Recipe, UserError
from common.run.folder import EVAL_JSON

if TYPE_CHECKING:  # what takes seconds to import is imported where it is used
    from common.adapter.load import TrainedAdapter

BASES = ("4bit", "original")
EXPORT_FORMATS = ("gguf", "lora", "ollama")
QUANTS = ("f16", "bf16", "q8_0")
MOST_CONTEXT = 8192  # tokens that an ollama model makes room for, where it has as many positions


def run_command(command: str, name: str, recipe: Recipe, arguments: Sequence[str]) -> int:
    """Runs one of COMMANDS on the adapter of a recipe; the exit status, as common.cli.run."""
    add_flags, do = COMMANDS[command]
    parser = argparse.ArgumentParser(prog=f"make {command} MODEL={name} ARGS=...", description=recipe.model.name)
    parser.add_argument("--out", help=f"folder of the run (default: outputs/{name})")
    add_flags(parser)
    flags = parser.parse_args(arguments)
    quiet_libraries()
    recipe = replace(recipe, out=flags.out or recipe.out or f"outputs/{name}")
    return exit_status(lambda: do(recipe, flags), recipe.out)


def _chat_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", help="answer this and end; only the answer goes to standard output")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--base", action="store_true", help="begin with the adapter off")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token each time")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument("--seed", type=int, help="draw the same answers each time")


def _chat(recipe: Recipe, flags: argparse.Namespace) -> None:
    from common.adapter.chat import Chat, Sampling, show, talk
    from common.adapter.load import find_adapter, load_trained, trained_tokenizer

    sampling = Sampling(flags.temperature, flags.top_p, flags.top_k, flags.max_new_tokens, flags.seed)
    adapter = find_adapter(recipe)
    with contextlib.redirect_stdout(sys.stderr):
        tokenizer = trained_tokenizer(adapter)
        model = load_trained(adapter)
    chat = Chat(model, tokenizer, sampling, flags.system, adapter_on=not flags.base)
    if flags.prompt is None:
        print(f"{adapter.recipe.model.name} with the adapter in {adapter.folder}")
        talk(chat)
        return
    chat.ask(flags.prompt, show)
    print()


def _eval_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="rows of this file or hub data set instead of the run's held-out rows")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="answers side by side (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write it (default: eval.json of the run)")


def _eval(recipe: Recipe, flags: argparse.Namespace) -> None:
    from common.adapter.load import find_adapter, load_trained, trained_tokenizer
    from common.data.rows import load_rows
    from common.run.evaluation import compare_with_base, print_evaluation, write_evaluation
    from common.run.prompts import sample_prompts
    from common.run.report import write_report

    adapter = find_adapter(recipe)
    tokenizer = trained_tokenizer(adapter)
    data, train = adapter.recipe.data, adapter.recipe.train
    if flags.data:
        data = replace(data, eval_source=flags.data, eval_split=data.split, revision=None)
    if data.eval_source:  # all its rows; the training data need not be read
        rows = replace(data, source=data.eval_source, split=data.eval_split, eval_source=None, eval_rows=0)
        held_out = load_rows(rows, tokenizer, train.seq_len).train
    else:
        held_out = load_rows(data, tokenizer, train.seq_len, train.seed).evaluation
    if held_out is None:
        raise UserError("the run held no rows out; name a file or a hub data set: DATA=held_out.jsonl")
    prompts = sample_prompts(held_out, tokenizer, flags.samples, train.seed)
    result = {
        "source": data.eval_source or f"held out of {data.source}",
        **compare_with_base(load_trained(adapter), tokenizer, held_out, prompts),
    }
    print_evaluation(result)
    path = flags.json or adapter.folder / EVAL_JSON
    write_evaluation(result, path)
    print(f"written to {path}")
    if not flags.json and not flags.data and adapter.run:
        print(f"and into {write_report(adapter.folder)}")


def _place_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", default="4bit", help="merge into the base as it was trained (4bit) or the original one"
    )
    parser.add_argument("--to", type=Path, help="where to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    _place_flags(parser)
    parser.add_argument("--kl-bound", type=float, default=1e-5, help="of the self-check, nats a token (default: 1e-5)")


def _merge(recipe: Recipe, flags: argparse.Namespace) -> None:
    _require_choice(flags.base, BASES, "BASE")
    target = flags.to or Path(f"{recipe.out}-merged")
    refuse_existing(target, folder=True, overwrite=flags.overwrite)
    from common.adapter.load import find_adapter
    from common.adapter.merge import MergedWeights, write_merged
    from common.adapter.merge_check import check_merged

    original = flags.base == "original"
    weights = MergedWeights(find_adapter(recipe), original=original)
    size = sum(shard.size for shard in weights.shards)
    with write_checked_aside(target, size, folder=True, overwrite=flags.overwrite) as folder:
        print(f"merging into {weights.into()}, {format_bytes(size)}")
        write_merged(weights, folder)
        print(f"self-check: {check_merged(weights.adapter, folder, bound=None if original else flags.kl_bound)}")
    print(f"the merged model is in {target}; {_peak()}")


def _export_flags(parser: argparse.ArgumentParser) -> None:
    _place_flags(parser)
    parser.add_argument("--format", default="gguf", help=f"one of {', '.join(EXPORT_FORMATS)}")
    parser.add_argument("--quant", default="q8_0", help=f"one of {', '.join(QUANTS)}")


def _export(recipe: Recipe, flags: argparse.Namespace) -> None:
    for value, choices, name in ((flags.format, EXPORT_FORMATS, "FORMAT"), (flags.quant, QUANTS, "QUANT")):
        _require_choice(value, choices, name)
    _require_choice(flags.base, BASES, "BASE")
    name = Path(recipe.out).name
    file = f"{name}-{flags.quant}.gguf"
    default = {
        "gguf": Path(f"{recipe.out}-gguf") / file,
        "lora": Path(f"{recipe.out}-gguf") / f"{name}-lora.gguf",
        "ollama": Path(f"{recipe.out}-ollama"),
    }
    target, is_folder = flags.to or default[flags.format], flags.format == "ollama"
    refuse_existing(target, folder=is_folder, overwrite=flags.overwrite)
    from common.adapter.load import find_adapter

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
        context = min(MOST_CONTEXT, weights.config.max_position_embeddings)
        text = modelfile(file, tokenizer, weights.generation_config(), context)
    with write_checked_aside(target, model.size, folder=is_folder, overwrite=flags.overwrite) as path:
        print(f"merging into {weights.into()}, {format_bytes(model.size)}")
        model.write(path / file if is_folder else path)
        if is_folder:
            (path / "Modelfile").write_text(text, encoding="utf-8")
            weights.write_note(path / MADE_FROM)
    print(f"the merged model is in {target}; {_peak()}")
    if is_folder:
        print(f"ollama create {name} -f {target}/Modelfile && ollama run {name}")


def _write_lora(adapter: "TrainedAdapter", target: Path, name: str, *, overwrite: bool) -> None:
    from common.adapter.gguf import write_adapter
    from common.model.files import load_config
    from common.run.folder import ADAPTER_WEIGHTS

    size = (adapter.folder / ADAPTER_WEIGHTS).stat().st_size
    with write_checked_aside(target, size, folder=False, overwrite=overwrite) as path:
        write_adapter(adapter, load_config(adapter.recipe.model), path, name)
    print(f"the adapter alone is in {target}, to be used with a GGUF of {adapter.recipe.model.name}")


def _report(recipe: Recipe, flags: argparse.Namespace) -> None:
    from common.run.report import write_report

    print(f"written: {write_report(Path(recipe.out))}")


def _require_choice(value: str, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _peak() -> str:
    from common.machine.device import GIB, peak_ram

    return f"peak of host memory {peak_ram() / GIB:.2f} GiB"


Flags = Callable[[argparse.ArgumentParser], None]
COMMANDS: dict[str, tuple[Flags, Callable[[Recipe, argparse.Namespace], None]]] = {
    "chat": (_chat_flags, _chat),
    "eval": (_eval_flags, _eval),
    "merge": (_merge_flags, _merge),
    "export": (_export_flags, _export),
    "report": (lambda parser: None, _report),
}
