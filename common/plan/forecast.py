"""The optimizer step of a recipe on a card, before anything is downloaded: its bytes moment by moment, and its time."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes import functional as bnb
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode

from common.machine.layout import ONE_PROCESS, Layout
from common.model.activation_checkpointing import Policy, checkpoint_activations, decoder_layers
from common.model.attention import PACKED_ATTENTION
from common.model.files import load_config
from common.model.optimizer import build_optimizer
from common.model.sharding import shard_layer, shard_root
from common.plan.count import count_step
from common.plan.fake_model import fake_lora_model
from common.plan.fake_process_group import fake_process_group
from common.plan.step import Speed, Step, splice
from common.recipe import Recipe

# Dense bf16 matmul with fp32 sums, and memory bandwidth, of the cards that we know: their data sheets; the H200's
# matmul speed is measured. Any other card is taken for the first: what a plan compares depends on the ratio alone.
SPEEDS = (
    Speed("RTX 4090", 165e12, 1.01e12),
    Speed("RTX 3090", 71e12, 0.94e12),
    Speed("H100", 790e12, 3.35e12),
    Speed("H200", 790e12, 4.8e12),
)

SHORT_EXAMPLE = 64  # tokens; data of shorter ones is rare


def speed_of(gpu: str | None) -> Speed:
    return next((speed for speed in SPEEDS if gpu and speed.name in gpu), SPEEDS[0])


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on beside the recipe."""

    dtype: torch.dtype = torch.bfloat16
    attention: str = PACKED_ATTENTION


class Forecast:
    """Counts steps of one recipe; each count is made once."""

    def __init__(
        self, recipe: Recipe, setting: Setting = Setting(), speed: Speed = SPEEDS[0], layout: Layout = ONE_PROCESS
    ) -> None:
        self.recipe, self.setting, self.speed, self.layout = recipe, setting, speed, layout
        self.layers: int = load_config(recipe.model).num_hidden_layers
        self._count, self._splice = cache(self.count), cache(self._spliced)
        # bitsandbytes reads its values one by one when it makes this table, which fake tensors have none of.
        bnb.name2qmap.setdefault("dynamic", bnb.create_dynamic_map())

    def step(self, tokens: int, policy: Policy, *, accumulates: bool = True, on_host: int = 0) -> Step:
        """The step of the whole model, every token trained, with micro-batches of so many tokens; what one card holds
        and does of it. on_host: of a model cut over cards, the layers whose parts wait in host memory.

        Counted on a few layers that recompute and a few that do not, and spliced. On a GPU with flash attention only
        the number of tokens matters, not the rows they lie in; elsewhere they are one row. Raises ValueError for an
        offload of one or two layers of a larger model: it saves nothing, and its layers are like no others.
        """
        if policy.offload and policy.kept and 0 < policy.recomputed < 3:
            raise ValueError(f"{policy}: too few to be worth it")
        return self._splice(tokens, policy, accumulates).with_parts_on_host(on_host)

    def _spliced(self, tokens: int, policy: Policy, accumulates: bool) -> Step:
        parts = []
        if policy.recomputed:
            edges = 2 if policy.offload else 1  # the first layer's input is the embedding's output, which stays
            few = replace(policy, layers=min(self.layers, edges + 2), kept=0)
            origin = copies(policy.recomputed, few.layers, edges)
            if policy.kept and self.layout.sharded:  # then none of them is the last, whose backward pass gathers itself
                origin = [min(i, max(0, few.layers - 2)) for i in range(policy.recomputed)]
            parts.append((self._count(tokens, few, accumulates), origin))
        if policy.kept:
            few = Policy(min(self.layers, 3), min(self.layers, 3))
            origin = copies(policy.kept, few.layers, 1)
            if policy.recomputed:  # then none of them is the first
                origin = [max(1, i) if few.layers > 2 else i for i in origin]
            parts.append((self._count(tokens, few, accumulates), origin))
        return splice(parts)

    def count(self, tokens: int, policy: Policy, accumulates: bool) -> Step:
        """The step of a model of `policy.layers` layers, counted."""
        recipe = self.recipe
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = fake_lora_model(
            recipe.model,
            recipe.lora,
            policy.layers,
            mode,
            dtype=self.setting.dtype,
            attention=self.setting.attention,
            kernels=recipe.train.kernels,
        )
        checkpoint_activations(model, policy)
        if not self.layout.sharded:
            return self._count_with(model, mode, tokens, accumulates)
        with fake_process_group(self.layout.processes) as mesh:
            with mode:
                for layer in decoder_layers(model):
                    shard_layer(layer, mesh)
                shard_root(model, mesh)
            return self._count_with(model, mode, tokens, accumulates)

    def _count_with(self, model: PeftModel, mode: FakeTensorMode, tokens: int, accumulates: bool) -> Step:
        recipe = self.recipe
        if recipe.train.optimizer == "paged_adamw_8bit":  # pages out when it must; planned as if it never did
            recipe = replace(recipe, train=replace(recipe.train, optimizer="adamw_8bit"))
        optimizer = build_optimizer(model, recipe.train)  # not under the mode: bitsandbytes makes tables of values
        with mode, patch.object(torch, "is_autocast_enabled", _is_autocast_enabled):
            batch = full_batch(
                tokens, min(tokens, recipe.train.seq_len), padding_free=self.setting.attention == PACKED_ATTENTION
            )

            def loss() -> torch.Tensor:
                with torch.autocast("cpu", self.setting.dtype, enabled=self.setting.dtype != torch.float32):
                    value: torch.Tensor = model(**batch, num_items_in_batch=tokens).loss
                return value

            return count_step(model, loss, optimizer, accumulates=accumulates, max_grad_norm=recipe.train.max_grad_norm)


_stock = torch.is_autocast_enabled


def _is_autocast_enabled(device_type: str = "cpu") -> bool:
    """PEFT asks without naming a device, and so about CUDA; here the CPU's autocast stands in for it."""
    return _stock(device_type)


def copies(layers: int, counted: int, edge: int) -> list[int]:
    """Which of the counted layers each of `layers` layers is a copy of: the one numbered `edge` is repeated."""
    if layers <= counted:
        return [*range(layers - 1), counted - 1]
    return [*range(edge), *[edge] * (layers - counted), *range(edge, counted)]


def full_batch(tokens: int, longest: int, *, padding_free: bool) -> dict[str, Any]:
    """A micro-batch in the form of common.data.batches.collate, every token trained; as a rectangle it is one row.

    Without padding it has the scratch memory of many short examples, and the attention of examples of `longest` tokens.
    """
    names = ("input_ids", "labels", "position_ids")
    batch: dict[str, Any] = {name: torch.zeros((1, tokens), dtype=torch.int64) for name in names}
    batch["trained_positions"] = torch.zeros(tokens, dtype=torch.int64)
    if padding_free:
        batch |= {"cu_seq_lens_q": torch.zeros(tokens // SHORT_EXAMPLE + 2, dtype=torch.int32), "max_length_q": longest}
    return batch
