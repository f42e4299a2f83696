"""What activation checkpointing does to BERT-large: the memory of a training step without it and with it.

    make demo                                # counted on any machine, and measured where there is an NVIDIA GPU
    python -m benchmarks.bert_large --rows 8 # a smaller batch, for a smaller card

BERT-large's encoder (24 layers of 1,024, 16 heads) is trained in full, in fp32 with AdamW, on 64 rows of 512 tokens.
The step below is plain PyTorch and transformers. It is counted by running it on fake tensors, which have a shape and
no memory (common.plan.count). docs/demo.md shows the result.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertModel

from common.machine.device import GIB
from common.machine.out_of_memory import out_of_memory
from common.plan.count import count_step
from common.plan.fake_model import keep_dropout_masks_as_on_gpu
from common.plan.picture import COLOURS
from common.plan.step import KINDS, Step

TOKENS = 512  # a row
NAMES = {False: "without checkpointing", True: "every layer recomputes"}
# All of BERT is trained, so what the count calls adapters elsewhere is the whole model here.
LABELS = {"adapters": "model"}
SMALLEST_SHOWN = GIB // 200  # bytes


def make_model(checkpointing: bool) -> BertModel:
    config = BertConfig(
        num_hidden_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
        attention_probs_dropout_prob=0.0,  # a CPU has no fused attention with dropout
    )
    model = BertModel(config, add_pooling_layer=False).train()
    if checkpointing:
        model.activation_checkpointing_enable()  # non-reentrant; every layer keeps its input alone
    return model


def compute_loss(model: BertModel, ids: torch.Tensor) -> torch.Tensor:
    """Stands in for a task's loss, which would add its own memory to both."""
    return model(input_ids=ids).last_hidden_state.square().mean()


def count(checkpointing: bool, rows: int) -> Step:
    """The step on fake tensors, moment by moment."""
    with FakeTensorMode() as mode:
        model = make_model(checkpointing)
    keep_dropout_masks_as_on_gpu(model)
    with mode:
        ids = torch.zeros((rows, TOKENS), dtype=torch.int64)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return count_step(model, lambda: compute_loss(model, ids), optimizer, accumulates=False)


def measure(checkpointing: bool, rows: int, steps: int = 3) -> str:
    """Peak of allocated memory and seconds of a step on this machine's GPU, in words."""
    try:
        model = make_model(checkpointing).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(30_000, (rows, TOKENS), device="cuda")
        for number in range(1 + steps):  # the first one allocates the optimizer's states
            if number == 1:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
                started = time.perf_counter()
            compute_loss(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
    except Exception as error:
        if out_of_memory(error) is None:
            raise
        return "out of memory"
    finally:
        model = optimizer = ids = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
    seconds = (time.perf_counter() - started) / steps
    return f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB, {seconds:.2f} s"


def table(steps: dict[bool, Step], measured: dict[bool, str]) -> str:
    """A Markdown table: what the bytes at the worst moment are for, the peak, the work, what a GPU measured."""
    at_peak = {checkpointing: step.at_peak() for checkpointing, step in steps.items()}
    flops = {checkpointing: sum(s.work.flops for s in step.segments) for checkpointing, step in steps.items()}
    lines = [["GiB at the worst moment", *(NAMES[checkpointing] for checkpointing in steps)]]
    for kind in KINDS:
        if any(parts[kind] >= SMALLEST_SHOWN for parts in at_peak.values()):
            lines.append([LABELS.get(kind, kind), *(f"{parts[kind] / GIB:.2f}" for parts in at_peak.values())])
    lines.append(["**peak, counted**", *(f"**{step.peak() / GIB:.2f}**" for step in steps.values())])
    lines.append(["matrix multiplications", *(f"{count / flops[False]:.2f} ×" for count in flops.values())])
    lines.append(["measured: peak, seconds a step", *measured.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def draw(steps: dict[bool, Step], rows: int, path: Path) -> None:
    """The memory over the course of a step, by what it is for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, (checkpointing, step) in zip(figure.subplots(1, 2, sharey=True), steps.items(), strict=True):
        moments = [(segment.name, now.copy()) for segment, now in step.timeline()]
        used = [kind for kind in KINDS if any(now[kind] >= SMALLEST_SHOWN for _, now in moments)]
        values = [[now[kind] / GIB for _, now in moments] for kind in used]
        colours = [COLOURS[KINDS.index(kind)] for kind in used]
        axes.stackplot(
            range(len(moments)), values, labels=[LABELS.get(kind, kind) for kind in used], colors=colours, linewidth=0
        )
        backward = next(number for number, (name, _) in enumerate(moments) if name.startswith("backward"))
        axes.axvline(backward, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"{NAMES[checkpointing]}: {step.peak() / GIB:.1f} GiB", pad=18)
        axes.set(xticks=[], xlim=(0, len(moments) - 1))
        for x, name, side in ((backward, "forward ", "right"), (backward, " backward, optimizer", "left")):
            axes.text(x, 1.0, name, transform=axes.get_xaxis_transform(), ha=side, va="bottom", fontsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("GiB")
    figure.supxlabel("each allocation and release of the step, in order", fontsize=9.5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.suptitle(f"BERT-large, fp32, AdamW, {rows} rows of {TOKENS} tokens: memory of one training step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="in the batch (default: 64)")
    parser.add_argument("--picture", type=Path, default=Path("outputs") / "demo_bert_large.png", metavar="FILE")
    args = parser.parse_args()
    steps = {checkpointing: count(checkpointing, args.rows) for checkpointing in NAMES}
    gpu = torch.cuda.is_available()
    measured = {checkpointing: measure(checkpointing, args.rows) if gpu else "not measured" for checkpointing in NAMES}
    print(table(steps, measured))
    where = f"measured on {torch.cuda.get_device_name()}" if gpu else "torch sees no GPU here: run it on one to measure"
    print(f"\n{where}, torch {torch.__version__}")
    draw(steps, args.rows, args.picture)
    print(f"drawn in {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
