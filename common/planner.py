"""Splits the rows of an optimizer step into micro-batches that fit the card.

Rows per optimizer step is the contract of a recipe: micro-batch rows x accumulation x processes always equals it.
The memory of a step is estimated from the config with the counts below, on the safe side.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from common.machine import GIB, Machine, require_gpu, this_machine, unusable_gpu
from common.recipe import Checkpointing, LoraSpec, ModelSpec, Recipe, TrainSpec, UserError
from common.weights import load_config

# NF4 + double quantisation, bits: 4 + 8/64 + 32/(64*256). arXiv:2305.14314 section 3
NF4_BYTES_PER_PARAM = (4 + 8 / 64 + 32 / (64 * 256)) / 8
LORA_BYTES_PER_PARAM = 4 * 4  # fp32: weight, gradient, two Adam moments
CONTEXT_BYTES = GIB // 2  # CUDA context and cuBLAS workspaces
# TRL 1.16's fused head (trl/kernels/chunked_logprob.py): tiles of 4096 tokens x 32768 entries, fp32, gradient in bf16
HEAD_TILE_TOKENS, HEAD_TILE_VOCABULARY, HEAD_TILE_BYTES = 4096, 32768, 4 + 2
RESERVE_SHARE = 0.05  # of the card: fragmentation, and what an estimate cannot see
# Past this size the matmuls are saturated and the 4-bit weights are dequantised rarely enough (2 % of a step at 8k
# tokens for 8B on an RTX 4090, derived); on a CPU, past this size the caches are.
TOKENS_PER_MICRO_BATCH = 8192
TOKENS_PER_MICRO_BATCH_CPU = 1024


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step: what is there whatever the batch, and what each token of a micro-batch adds."""

    weights: int
    embeddings_and_head: int
    adapters: int  # with their gradients and optimizer states
    working_layer: int  # the largest weight, dequantised
    logits: int  # the fused head's tiles
    per_token: int

    @property
    def fixed(self) -> int:
        steady = self.weights + self.embeddings_and_head + self.adapters
        return steady + self.working_layer + self.logits + CONTEXT_BYTES

    def step(self, tokens: int) -> int:
        return self.fixed + self.per_token * tokens

    def sum_up(self, tokens: int) -> str:
        parts = {
            "weights": self.weights,
            "embeddings and head": self.embeddings_and_head,
            "adapters with gradients and optimizer": self.adapters,
            "one weight dequantised": self.working_layer,
            "logit tiles": self.logits,
            "CUDA context": CONTEXT_BYTES,
            f"{tokens:,} tokens": self.per_token * tokens,
        }
        return " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


@dataclass(frozen=True)
class Plan:
    """How one optimizer step runs."""

    micro_batch_rows: int
    accumulation: int
    processes: int
    checkpointing: Checkpointing
    text: str  # for people

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_rows * self.accumulation * self.processes


def estimate_memory(config: PretrainedConfig, model: ModelSpec, lora: LoraSpec, policy: Checkpointing) -> Memory:
    """Bytes of one training step on a GPU with 16-bit compute and stock modules, from the config's shapes alone."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linear = {
        name: module
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and module is not skeleton.get_output_embeddings()
    }
    linear_params = sum(module.weight.numel() for module in linear.values())
    all_params = sum(parameter.numel() for parameter in skeleton.parameters())
    lora_params = sum(
        lora.rank * (module.in_features + module.out_features)
        for name, module in linear.items()
        if name.rsplit(".", 1)[-1] in lora.target_modules
    )
    layers, hidden, mlp = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, k = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    # Bytes that stock modules save per token and layer in bf16 (180 KiB for Llama 3 8B, counted on fake tensors), and
    # the input of each projection once more: PEFT casts it to the fp32 of its adapter, autocast back.
    saved = 12 * hidden + 8 * mlp + 4 * q + 4 * k + 4 * config.num_attention_heads + 14 * lora.rank
    saved += 2 * (5 * hidden + q + mlp)
    boundary = 2 * hidden
    kept = layers * (saved if policy == "none" else boundary)
    working = 2 * saved  # the layer under way: what it saved, and gradients of the same shapes
    return Memory(
        weights=int(linear_params * (NF4_BYTES_PER_PARAM if model.bits == 4 else 2)),
        embeddings_and_head=2 * (all_params - linear_params),
        adapters=LORA_BYTES_PER_PARAM * lora_params,
        working_layer=2 * max(module.weight.numel() for module in linear.values()),
        logits=HEAD_TILE_TOKENS * min(config.vocab_size, HEAD_TILE_VOCABULARY) * HEAD_TILE_BYTES,
        per_token=kept + working,
    )


def plan_for_card(recipe: Recipe, *, dry: bool = False) -> Plan:
    """The micro-batch for this machine's GPU, or for the recipe's card with `dry`; prints it. Nothing is downloaded
    but, for a model that does not ship its config here, the config.

    Raises UserError when the recipe needs a GPU that is not there, and when one row does not fit.
    """
    machine = this_machine()
    if recipe.card_gib is not None and not dry:
        require_gpu(recipe.model.name)
    print(f"machine: {machine}")
    if machine.is_gpu:
        plan = plan_batch(recipe, machine.free_bytes(), f"{machine.free_bytes() / GIB:.1f} GiB free on {machine.name}")
    elif recipe.card_gib is not None:
        plan = plan_batch(recipe, int(recipe.card_gib * GIB), f"a card of {recipe.card_gib:g} GiB")
    else:
        if reason := unusable_gpu():
            print(f"warning: training on the CPU: {reason}")
        plan = _cpu_plan(recipe.train, machine)
    print(plan.text)
    return plan


def plan_batch(recipe: Recipe, card_bytes: int, card: str) -> Plan:
    """The largest micro-batch that fits `card_bytes`, up to TOKENS_PER_MICRO_BATCH tokens.

    Raises UserError when not even one row fits, and when a row is longer than the model's positions.
    """
    train = recipe.train
    config = load_config(recipe.model)
    positions = getattr(config, "max_position_embeddings", train.seq_len)
    if train.seq_len > positions:
        raise UserError(f"TrainSpec.seq_len is {train.seq_len:,}; {recipe.model.name} has {positions:,} positions")
    memory = estimate_memory(config, recipe.model, recipe.lora, train.checkpointing)
    budget = int(card_bytes * (1 - RESERVE_SHARE))
    per_row = memory.per_token * train.seq_len
    if memory.step(train.seq_len) > budget:
        over = (memory.step(train.seq_len) - budget) / GIB
        room = (budget - memory.fixed) // memory.per_token
        advice = f"Lower TrainSpec.seq_len to {room // 256 * 256:,}" if room >= 256 else "Take a smaller model"
        if train.checkpointing == "none":
            advice = "Set checkpointing='every layer'"
        raise UserError(
            f"one row does not fit {card}: {memory.fixed / GIB:.1f} GiB fixed + {per_row / GIB:.1f} GiB per row is "
            f"{over:.1f} GiB over the budget of {budget / GIB:.1f} GiB. {advice}"
        )
    fitting = (budget - memory.fixed) // per_row
    rows = _largest_divisor(_rows_per_process(train), min(fitting, max(1, TOKENS_PER_MICRO_BATCH // train.seq_len)))
    tokens = rows * train.seq_len
    why = (
        f"estimated peak {memory.step(tokens) / GIB:.1f} GiB of {card}, {RESERVE_SHARE:.0%} of it in reserve. In GiB:\n"
        f"  {memory.sum_up(tokens)}"
    )
    return _plan(train, rows, why)


def _cpu_plan(train: TrainSpec, machine: Machine) -> Plan:
    limit = max(1, TOKENS_PER_MICRO_BATCH_CPU // train.seq_len)
    rows = _largest_divisor(_rows_per_process(train), limit)
    return _plan(train, rows, f"on a CPU at most {TOKENS_PER_MICRO_BATCH_CPU:,} tokens at a time ({machine.name})")


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun


def _rows_per_process(train: TrainSpec) -> int:
    if train.rows_per_step % _processes():
        raise UserError(
            f"TrainSpec.rows_per_step is {train.rows_per_step}, which {_processes()} processes cannot share"
        )
    return train.rows_per_step // _processes()


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, number + 1) if number % divisor == 0 and divisor <= max(limit, 1))


def _plan(train: TrainSpec, micro_batch_rows: int, why: str) -> Plan:
    accumulation = _rows_per_process(train) // micro_batch_rows
    micro_batches = "1 micro-batch" if accumulation == 1 else f"{accumulation} micro-batches"
    shared = f" on each of {_processes()} processes" if _processes() > 1 else ""
    text = (
        f"plan: {train.rows_per_step} rows of {train.seq_len:,} tokens per optimizer step: {micro_batches} of "
        f"{micro_batch_rows} rows{shared}; recompute: {train.checkpointing}\n  {why}"
    )
    return Plan(micro_batch_rows, accumulation, _processes(), train.checkpointing, text)
