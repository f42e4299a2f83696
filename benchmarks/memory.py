"""Predicted against measured memory and time of real steps, on the GPU of this machine. Random weights, no download.

    make memory                                       # three models, two lengths, every policy; about ten minutes
    make memory ARGS="--models llama3-8b --tokens 2048"
    make memory ARGS="--models llama3-8b --on-host 0 8 16 32"   # with the weights of so many layers in host memory
    make memory ARGS="--models llama3-8b --tokens 32768 --policies tiles by-head --repeats 1"      # long rows
    make memory ARGS="--models tiny --tokens 64 --on-host 0 4"  # a rehearsal, on a CPU too: nothing there is a result

The step is the one that a plan counts: full rows, every token trained; gradients of an earlier micro-batch and
optimizer states exist already. For a step that does not fit the card the result says so, with the prediction alone.
With weights in host memory one more step is profiled: which share of the copies' time lies beside a kernel, and at what
rate they come. Results go to benchmarks/results/memory_<gpu>.json.
"""

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import recipe_of
from benchmarks.results_folder import result_path, write_result
from common.data.batches import HOST_IDS
from common.machine.device import GIB, Machine, this_machine
from common.machine.layout import Layout
from common.machine.out_of_memory import out_of_memory
from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.attention import PACKED_ATTENTION
from common.model.held_adapters import held_adapters
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.model.optimizer import build_optimizer
from common.plan.card import WORKSPACE_BYTES
from common.plan.forecast import Forecast, full_batch
from common.plan.machine_plan import setting_of
from common.plan.speed import speed_of
from common.recipe import Recipe, UserError

MODELS = ("llama3-8b", "mistral-7b", "qwen-14b")  # what is measured where none is named
TOKENS = (2_048, 8_192)


def named_policies(layers: int) -> dict[str, Policy]:
    """Each kind of policy by its name for --policies."""
    return {
        "none": Policy(layers, layers),
        "half": Policy(layers, layers // 2),
        "every-layer": Policy(layers),
        "keep-attention": Policy(layers, keep_attention=True),
        "offload": Policy(layers, offload=True),
        "tiles": Policy(layers, offload=True, tile=4096),
        "by-head": Policy(layers, offload=True, tile=1024, by_head=True),
    }


POLICIES = list(named_policies(2))
SHORT_ROWS = POLICIES[:5]  # what is measured where none is named


def policies(layers: int, names: Iterable[str] = SHORT_ROWS) -> list[Policy]:
    return [named_policies(layers)[name] for name in names]


def random_step(model: PeftModel, forecast: Forecast, tokens: int, machine: Machine) -> Callable[[], list[float]]:
    """A function that runs an optimizer step of two micro-batches and returns the seconds of each micro-batch.

    A micro-batch is one row of `tokens` random tokens.
    """
    train = forecast.recipe.train
    optimizer = build_optimizer(model, train)
    batch = full_batch(tokens, tokens, padding_free=forecast.setting.attention == PACKED_ATTENTION)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    batch["input_ids"] = torch.randint(vocabulary, (1, tokens))
    batch["labels"], batch["position_ids"] = batch["input_ids"].clone(), torch.arange(tokens)[None]
    batch["trained_positions"] = torch.arange(tokens - 1)
    if "cu_seq_lens_q" in batch:
        batch["cu_seq_lens_q"] = torch.tensor([0, tokens], dtype=torch.int32)
    batch[HOST_IDS] = batch["input_ids"].numpy()  # as the collator
    batch = {name: value.to(machine.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = held_adapters(model)

    def micro_batch() -> float:
        if machine.is_gpu:
            torch.cuda.synchronize()  # the optimizer's kernels of the step before
        started = time.perf_counter()
        with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
            loss = model(**batch, num_items_in_batch=2 * tokens).loss
        loss.backward()
        if machine.is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def step() -> list[float]:
        held.hold()  # as the trainer
        seconds = [micro_batch() for _ in range(2)]
        held.release()
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return seconds

    return step


def measure(
    model: PeftModel,
    forecast: Forecast,
    tokens: int,
    policy: Policy,
    machine: Machine,
    repeats: int = 3,
    on_host: int = 0,
) -> dict[str, Any]:
    """Measures optimizer steps of two micro-batches of so many tokens, and predicts the same.

    Bytes are those of torch.cuda.max_memory_allocated and max_memory_reserved, None on a CPU. Seconds are those of the
    fastest micro-batch, without the optimizer. on_host: layers of the model whose weights stream; on a GPU the result
    then has their "copies", as copies_of says. Whether the embedding waits in host memory too is the forecast's.
    """
    checkpoint_activations(model, policy)
    step = random_step(model, forecast, tokens, machine)
    step()  # compiles the kernels and allocates the optimizer states
    gc.collect()  # what an earlier measurement left in circles is not this step's
    if machine.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = [time for _ in range(repeats) for time in step()]
    allocated, reserved = machine.allocated_bytes(), machine.peak_bytes() if machine.is_gpu else None
    copies = profiled_copies(step) if machine.is_gpu and on_host else None
    predicted = forecast.step(tokens, policy, examples=1, on_host=on_host)
    on_card = forecast.step(tokens, policy, examples=1)
    return {
        "model": forecast.recipe.model.name,
        "tokens": tokens,
        "policy": str(policy),
        "on_host": on_host,
        "embedding_on_host": forecast.layout.embedding_on_host,
        "streamed_bytes": predicted.link_bytes() - on_card.link_bytes(),  # of weights, in a micro-batch
        "predicted_bytes": predicted.peak() + WORKSPACE_BYTES,
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "predicted_seconds": sum(forecast.speed.seconds(s.work) for s in predicted.segments if s.name != "optimizer"),
        "seconds": min(seconds),
        "tokens_per_s": tokens / min(seconds),
        "copies": copies,
    }


def profiled_copies(step: Callable[[], Any]) -> dict[str, float] | None:
    """The copies to the card in one more step, by torch's profiler, as copies_of says."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return copies_of(profiler.events())


def copies_of(events: Iterable[Any]) -> dict[str, float] | None:
    """Seconds of all copies from host memory to the card, and the share of them that lies beside a kernel.

    events: torch's FunctionEvents, with times in microseconds. None where nothing was copied.
    """
    on_card = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    kernels: list[list[float]] = []  # moments at which kernels run, without overlaps
    for event in sorted(on_card, key=lambda event: event.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        if re.match(r"mem(cpy|set)", event.name, re.IGNORECASE):
            continue
        if kernels and start <= kernels[-1][1]:
            kernels[-1][1] = max(end, kernels[-1][1])
        else:
            kernels.append([start, end])
    total = beside = 0.0
    for event in on_card:
        if re.match(r"memcpy HtoD", event.name, re.IGNORECASE):
            start, end = event.time_range.start, event.time_range.end
            total += end - start
            beside += sum(max(0.0, min(end, stop) - max(start, first)) for first, stop in kernels)
    return {"seconds": total / 1e6, "beside_kernels": beside / total} if total else None


def measure_recipe(
    recipe: Recipe,
    lengths: list[int],
    machine: Machine,
    keep: Callable[[dict[str, Any]], None],
    on_host: int = 0,
    names: Iterable[str] = SHORT_ROWS,
    repeats: int = 3,
    *,
    embedding_on_host: bool = False,
) -> list[dict[str, Any]]:
    """Measures policies at every length, in the order of `lengths`. What does not fit has its prediction alone.

    keep: is given each measurement as soon as it is there. on_host: layers whose weights stream. names: of POLICIES.
    """
    recipe = replace(recipe, model=replace(recipe.model, weights="random"))
    layout = Layout(on_host=on_host, embedding_on_host=embedding_on_host)
    forecast = Forecast(recipe, setting_of(machine, recipe.model), speed_of(machine.name), replace(layout, on_host=0))
    model = attach_lora(load_4bit(recipe.model, machine, layout=layout), recipe.lora).train()
    use_lean_layers(model, recipe.train.kernels)
    results = []
    for tokens in lengths:
        for policy in policies(forecast.layers, names):
            try:
                results.append(measure(model, forecast, tokens, policy, machine, repeats, on_host))
            except Exception as error:
                if out_of_memory(error) is None:
                    raise
                predicted = forecast.step(tokens, policy, examples=1, on_host=on_host).peak() + WORKSPACE_BYTES
                results.append({"model": recipe.model.name, "tokens": tokens, "policy": str(policy)})
                results[-1] |= {"on_host": on_host, "embedding_on_host": embedding_on_host}
                results[-1] |= {"predicted_bytes": predicted, "allocated_bytes": None, "out_of_memory": True}
            model.zero_grad()
            gc.collect()
            keep(results[-1])
            print(in_words(results[-1]), flush=True)
    return results


def in_words(result: dict[str, Any]) -> str:
    waits = Layout(on_host=result["on_host"], embedding_on_host=result["embedding_on_host"]).waits
    stream = f", {waits} in host memory" if waits else ""
    line = f"{result['model']} {result['tokens']:,} tokens, {result['policy']}{stream}: predicted "
    line += f"{result['predicted_bytes'] / GIB:.2f} GiB"
    if result.get("out_of_memory"):
        return line + ", out of memory"
    if result["allocated_bytes"] is not None:
        error = result["predicted_bytes"] / result["allocated_bytes"] - 1
        line += f", measured {result['allocated_bytes'] / GIB:.2f} allocated ({error:+.1%}), "
        line += f"{result['reserved_bytes'] / GIB:.2f} reserved"
    line += f"; {result['tokens_per_s']:,.0f} tokens/s"
    if copies := result["copies"]:
        # Of two micro-batches; the batches' own copies and those of layer inputs are a few of them.
        rate = 2 * result["streamed_bytes"] / copies["seconds"] / 1e9
        line += f"; {copies['beside_kernels']:.0%} of the copies beside a kernel, at {rate:.1f} GB/s or more"
    return line


def hidden_share(streamed: dict[str, Any], on_card: dict[str, Any], link_bytes_per_second: float) -> float:
    """The share of the copies' time that a micro-batch does not take longer for them.

    By two measurements, with the weights of some layers in host memory and with all of them on the card.
    """
    copies = streamed["streamed_bytes"] / link_bytes_per_second
    return 1 - max(0.0, streamed["seconds"] - on_card["seconds"]) / copies


def hidden_lines(measurements: list[dict[str, Any]], link_bytes_per_second: float) -> list[str]:
    """How much of the copying hides, for each measurement with streamed weights that has one without beside it."""
    timed = [one for one in measurements if "seconds" in one]
    on_card = {(one["model"], one["tokens"], one["policy"]): one for one in timed if not one["on_host"]}
    lines = []
    for one in timed:
        beside = on_card.get((one["model"], one["tokens"], one["policy"]))
        if one["on_host"] and beside:
            share = one["hidden_share"] = hidden_share(one, beside, link_bytes_per_second)
            ratio = one["seconds"] / beside["seconds"]
            lines.append(
                f"{one['model']} {one['tokens']:,} tokens, {one['policy']}, weights of {one['on_host']} layers in host "
                f"memory: {ratio:.3f} of the time with all on the card; {share:.0%} of the copies hide, at "
                f"{link_bytes_per_second / 1e9:.0f} GB/s"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=(*MODELS, "llama3-70b", "tiny"))
    parser.add_argument("--on-host", nargs="+", type=int, default=[0], help="layers whose weights wait in host memory")
    parser.add_argument("--embedding-on-host", action="store_true", help="the embedding waits there too")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--policies", nargs="+", default=SHORT_ROWS, choices=POLICIES)
    parser.add_argument("--repeats", type=int, default=3, help="optimizer steps that are timed")
    parser.add_argument("--out", type=Path, help="the .json")
    args = parser.parse_args()
    machine = this_machine()
    if not machine.is_gpu and args.models != ["tiny"]:
        print("error: this measures a GPU, and torch sees none here; the counts are tested on a CPU by make test")
        return 2
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": str(machine),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "command": " ".join(sys.argv),
        "recipes": {},
        "measurements": [],
    }
    path = args.out or result_path("memory")

    def keep(measurement: dict[str, Any]) -> None:
        results["measurements"].append(measurement)
        write_result(results, path)

    for name in args.models:
        recipe = recipe_of(name)
        results["recipes"][name] = asdict(recipe)
        for on_host in args.on_host:
            try:
                measure_recipe(
                    recipe,
                    args.tokens,
                    machine,
                    keep,
                    on_host,
                    args.policies,
                    args.repeats,
                    embedding_on_host=args.embedding_on_host,
                )
            except UserError as error:
                print(f"{name}: {error}")
            gc.collect()
            if machine.is_gpu:
                torch.cuda.empty_cache()
    lines = hidden_lines(results["measurements"], speed_of(machine.name).link_bytes_per_second)
    if lines and machine.is_gpu:  # a CPU's copies go over no link
        print("\n".join(lines))
        write_result(results, path)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
