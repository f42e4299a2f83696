"""A short run that ends with a held-out loss: what benchmarks.defaults and benchmarks.nf4_cost repeat.

It computes in bf16, on a CPU too, where that takes half the time of fp32. On a GPU the plan splits the optimizer steps
into micro-batches and chooses which layers recompute.
"""

import argparse
import contextlib
import gc
import io
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from common.data import load_rows
from common.data.batches import Batch, collate
from common.machine.device import Machine, this_machine
from common.model import attach_lora, checkpoint_activations, load_4bit, load_tokenizer, use_lean_layers
from common.model.attention import uses_packed_attention
from common.model.optimizer import build_optimizer
from common.plan import Plan, plan_for_card
from common.recipe import DataSpec, Kernels, LoraSpec, ModelSpec, Recipe, TrainSpec, UserError
from common.run.lr_schedule import build_lr_schedule


@dataclass(frozen=True)
class Settings:
    """What all runs of a benchmark share. Rows are packed rows of at most seq_len tokens."""

    model: str
    steps: int
    rows_per_step: int
    seq_len: int
    held_out_rows: int
    chat_template: str | None = None  # as ModelSpec's


def bf16_machine() -> Machine:
    """Raises UserError on a GPU without bf16: these runs have no loss scaling, which fp16 needs."""
    machine = this_machine()
    if machine.is_gpu and machine.dtype != torch.bfloat16:
        raise UserError(f"this benchmark computes in bf16, which {machine.name} lacks")
    reason = machine.reason if machine.is_gpu else "half the time of fp32"
    return Machine(machine.device, torch.bfloat16, reason, machine.name)


@cache  # in each process; tokenising takes seconds
def load_data(settings: Settings, source: str) -> tuple[Dataset, Dataset, int]:
    """Packed rows to train on, packed rows to hold out, and the id of the token that pads.

    Examples longer than seq_len are left out, however many. Raises UserError as load_rows.
    """
    tokenizer = load_tokenizer(ModelSpec(settings.model, chat_template=settings.chat_template))
    spec = DataSpec(source, eval_rows=10**6, max_long_share=1.0)  # a tenth of the examples is held out
    rows = load_rows(spec, tokenizer, settings.seq_len, shows_example=False)
    if rows.evaluation is None:
        raise UserError(f"{source} is too small: a tenth of it is held out, which is not one example")
    return rows.train, rows.evaluation, tokenizer.pad_token_id


@cache
def plan_once(settings: Settings, rank: int, bits: int) -> Plan:
    """The same plan serves every learning rate and alpha."""
    return plan_for_card(recipe_of_run(settings, LoraSpec(rank, 1.0), 1.0, bits))


def recipe_of_run(settings: Settings, lora: LoraSpec, learning_rate: float, bits: int) -> Recipe:
    model = ModelSpec(settings.model, bits=bits, chat_template=settings.chat_template)
    kernels: Kernels = "lean" if this_machine().is_gpu else "stock"  # a CPU computes the stock layers faster in bf16
    train = TrainSpec(settings.seq_len, settings.rows_per_step, learning_rate, kernels=kernels)
    return Recipe(model, DataSpec("none"), lora, train, None)


class ShortRun:
    """A fresh adapter on the base, to train and to measure."""

    def __init__(
        self, settings: Settings, source: str, lora: LoraSpec, learning_rate: float, seed: int, *, bits: int = 4
    ) -> None:
        """bits: of the base, 4 or 16. seed: of the adapter's first weights and of the order of the rows.

        Raises UserError as load_rows, plan_for_card and load_4bit.
        """
        gc.collect()  # an earlier run's model
        self.settings, self.seed, self.machine = settings, seed, bf16_machine()
        with contextlib.redirect_stdout(io.StringIO()):
            self.rows, self.held_out, pad = load_data(settings, source)
            recipe = recipe_of_run(settings, lora, learning_rate, bits)
            plan = plan_once(settings, lora.rank, bits)
            self.model: PeftModel = attach_lora(load_4bit(recipe.model, self.machine), lora, seed)
            use_lean_layers(self.model, recipe.train.kernels)
            checkpoint_activations(self.model, plan.checkpointing)
        self.train_spec, self.micro_batch_rows = recipe.train, plan.micro_batch_rows
        self.collate = partial(collate, pad_token_id=pad, padding_free=uses_packed_attention(self.model))

    def train(self) -> list[float]:
        """Trains the adapter. Returns the loss of each step in nats; the last one is not finite where it diverged."""
        optimizer = build_optimizer(self.model, self.train_spec)
        steps, ratio = self.settings.steps, self.train_spec.warmup_ratio
        schedule = build_lr_schedule(optimizer, self.train_spec.lr_schedule, ratio, steps)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        losses: list[float] = []
        self.model.train()
        for step in range(steps):
            first = step * self.settings.rows_per_step
            rows = [order[n % len(order)] for n in range(first, first + self.settings.rows_per_step)]
            losses.append(self._backward(rows))
            if not math.isfinite(losses[-1]):
                break
            torch.nn.utils.clip_grad_norm_(parameters, self.train_spec.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return losses

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean over the trained tokens of the held-out rows, in nats; NaN where the adapter has diverged."""
        batches = self._held_out_batches()
        tokens = [len(batch["trained_positions"]) for batch in batches]
        self.model.eval()
        return sum(self._loss(b, n).item() * n for b, n in zip(batches, tokens, strict=True)) / sum(tokens)

    def held_out_tokens(self) -> int:
        """How many tokens held_out_loss is the mean over."""
        return sum(len(batch["trained_positions"]) for batch in self._held_out_batches())

    def _held_out_batches(self) -> list[Batch]:
        count = min(self.settings.held_out_rows, len(self.held_out))
        return [self.collate([self.held_out[row]]) for row in range(count)]

    def _backward(self, rows: list[int]) -> float:
        """Adds the gradient of the mean loss of these rows' trained tokens. Returns that loss."""
        size = self.micro_batch_rows
        parts = [self.rows.select(rows[start : start + size]).to_list() for start in range(0, len(rows), size)]
        batches = [self.collate(part) for part in parts]
        tokens = sum(len(batch["trained_positions"]) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self._loss(batch, tokens)
            loss.backward()
            total += loss.item()
        return total

    def _loss(self, batch: Batch, tokens: int) -> torch.Tensor:
        """The batch's NLL in nats, divided by `tokens`: fp32 scalar."""
        inputs: dict[str, Any] = {
            name: value.to(self.machine.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        with torch.autocast(self.machine.device.type, self.machine.dtype):
            loss: torch.Tensor = self.model(**inputs, num_items_in_batch=tokens).loss
        return loss


def finite(value: float) -> float | None:
    """None for a value that JSON has no number for."""
    return value if math.isfinite(value) else None


def add_flags(parser: argparse.ArgumentParser, held_out_rows: int) -> None:
    """The flags of a benchmark of short runs. held_out_rows: the default, which a smaller set may not reach."""
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
    parser.add_argument("--chat-template", help="path of a Jinja file; left out, the model's own")
    parser.add_argument("--data", type=_named_source, action="append", metavar="NAME=SOURCE", help="may be repeated")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rows-per-step", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--held-out-rows", type=int, default=held_out_rows)
    parser.add_argument("--json", type=Path, help="the result")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="trains nothing: shows this result")


def settings_of(flags: argparse.Namespace) -> Settings:
    return Settings(
        flags.model, flags.steps, flags.rows_per_step, flags.seq_len, flags.held_out_rows, flags.chat_template
    )


def data_of(flags: argparse.Namespace) -> dict[str, str]:
    """The source of each data set's name; left out, the tool calls that ship here."""
    return dict(flags.data or [("tool calls", "data/tiny/train.jsonl")])


def _named_source(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if not (name.strip() and source.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=SOURCE, such as 'mine=my_chats.jsonl'")
    return name.strip(), source.strip()
