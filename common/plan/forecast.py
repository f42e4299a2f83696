"""The optimizer step of a recipe on a card, before anything is downloaded: its bytes moment by moment, and its time."""

import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes import functional as bnb
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode

from common.machine.layout import ONE_PROCESS, Layout
from common.model.activation_checkpointing import Policy, checkpoint_activations, decoder_layers
from common.model.attention import PACKED_ATTENTION
from common.model.config import load_config
from common.model.lean_layers import can_tile
from common.model.optimizer import build_optimizer
from common.model.preference_loss import EXAMPLE_IDS, KL, REFERENCE, SIGNS, answer_likelihoods, preference_loss
from common.model.sharding import shard_layer, shard_root
from common.plan.count import count_forward, count_step
from common.plan.fake_model import fake_lora_model
from common.plan.fake_process_group import fake_process_group
from common.plan.ledger import round_up
from common.plan.mixed_layers import find_mixed_layers
from common.plan.speed import KNOWN_GPUS, Speed
from common.plan.splice import Part, layers_to_copy, splice_layers
from common.plan.step import ADAPTERS, EMBEDDINGS, WEIGHTS, Step
from common.recipe import PreferenceSpec, Recipe

# Before the data are known: rows shorter than this are packed with examples as short as the next constant says, which
# data rarely has in mean; longer rows are there for long examples, and are one each.
LONG_ROW_TOKENS = 8_192
SHORT_EXAMPLE_TOKENS = 64
PARAMETERS = (WEIGHTS, EMBEDDINGS, ADAPTERS)  # kinds of a decoder layer's parameters; its norms count as EMBEDDINGS


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on beside the recipe."""

    dtype: torch.dtype = torch.bfloat16  # of the compute
    attention: str = PACKED_ATTENTION  # its name in transformers
    triton: bool = True  # the operators of common.kernels run as kernels; False: as references, which allocate more
    # Examples in the row of the data that has the most, of pairs both answers; None: not known yet (assumed_examples).
    examples_per_row: int | None = None


class Forecast:
    """Counts steps of one recipe. Each count is made once."""

    def __init__(
        self,
        recipe: Recipe,
        setting: Setting = Setting(),
        speed: Speed = KNOWN_GPUS[0],
        layout: Layout = ONE_PROCESS,
        cards: int = 1,
    ) -> None:
        """cards: of a machine, which share the weights that wait in its host memory where layers are whole."""
        self.recipe, self.setting, self.speed, self.layout = recipe, setting, speed, layout
        self.cards = cards
        config = load_config(recipe.model)
        self.layers: int = config.num_hidden_layers
        self.embedding_row_bytes: int = config.hidden_size * setting.dtype.itemsize
        self.embedding_bytes: int = config.vocab_size * self.embedding_row_bytes
        self.mixed = find_mixed_layers(recipe.model, setting.dtype, layout.processes if layout.sharded else 1)
        self._count, self._step, self._forward = cache(self.count), cache(self._splice), cache(self._splice_forward)
        self.examples_per_row = setting.examples_per_row or assumed_examples(recipe, recipe.train.seq_len)
        # bitsandbytes reads the values of this table when it makes it; a fake tensor has none. So it is made before.
        bnb.name2qmap.setdefault("dynamic", bnb.create_dynamic_map())

    def step(
        self,
        tokens: int,
        policy: Policy,
        *,
        rows: int = 1,
        examples: int | None = None,
        accumulates: bool = True,
        on_host: int = 0,
    ) -> Step:
        """The step of the whole model with micro-batches of so many tokens, every token trained: one card's part of it.

        Counted on a few layers and spliced. rows: in which the tokens lie, each as long as the others. Packed attention
        knows no rows; another attention has a mask of rows x length x length. examples: that the tokens are of, which
        packed attention keeps apart; None is `examples_in`. on_host: layers whose shards, or weights, wait in host
        memory.

        Raises ValueError for an offload of one or two layers of a larger model. It saves no memory, and those layers
        are unlike the ones that are counted.
        """
        if policy.offload and policy.kept and 0 < policy.recomputed < 3:
            raise ValueError(f"{policy}: too few to be worth it")
        if self.packs:
            rows, examples = 1, examples or self.examples_in(tokens)
        else:
            examples = self.examples_in(tokens)
        return self._with_weights_on_host(self._step(tokens, policy, accumulates, rows, examples), tokens, on_host)

    def forward(self, tokens: int, *, rows: int = 1, on_host: int = 0, tile: int = 0, by_head: bool = False) -> Step:
        """A forward pass without gradients, beside what a step keeps, with the log-likelihood of each answer.

        Of a recipe with a PreferenceSpec, whose reference it is. Arguments as those of `step`, and of Policy.
        """
        step = self._forward(tokens, 1 if self.packs else rows, tile, by_head)
        return self._with_weights_on_host(step, tokens, on_host)

    def _with_weights_on_host(self, step: Step, tokens: int, on_host: int) -> Step:
        step = step.with_layers_on_host(on_host, self.cards)
        if not self.layout.embedding_on_host:
            return step
        return step.with_embedding_on_host(
            round_up(self.embedding_bytes), tokens * self.embedding_row_bytes, self.cards
        )

    def with_embedding(self, *, on_host: bool) -> "Forecast":
        """The forecast with the embedding in host memory, or on the card. The two share their counts."""
        other = copy.copy(self)
        other.layout = replace(self.layout, embedding_on_host=on_host)
        return other

    def examples_in(self, tokens: int) -> int:
        """Examples in a micro-batch of full rows that has so many tokens together."""
        return -(-tokens * self.examples_per_row // self.recipe.train.seq_len)

    @property
    def packs(self) -> bool:
        """Whether the rows of a micro-batch lie one after another, without padding and without a mask."""
        return self.setting.attention == PACKED_ATTENTION

    @cached_property
    def can_tile(self) -> bool:
        """Whether the layers can compute in tiles of tokens (Policy.tile)."""
        return self.recipe.train.kernels == "lean" and can_tile(self._fake_model(1)[0])

    def gathered_layer_bytes(self) -> int:
        """Bytes of the largest decoder layer's parameters gathered from all cards; 0 where layers are not sharded."""
        if not self.layout.sharded:
            return 0
        shards = self.step(self.recipe.train.seq_len, Policy(self.layers)).sharded_per_layer
        return self.layout.processes * sum(shards[kind] for kind in PARAMETERS) + self.mixed.gathered

    def _splice(self, tokens: int, policy: Policy, accumulates: bool, rows: int, examples: int) -> Step:
        parts = []
        if policy.recomputed:
            parts.append(self._layers_that_recompute(tokens, policy, accumulates, rows, examples))
        if policy.kept:
            parts.append(self._layers_that_keep(tokens, policy, accumulates, rows, examples))
        return self.mixed.add_to(splice_layers(parts))

    def _splice_forward(self, tokens: int, rows: int, tile: int, by_head: bool) -> Step:
        counted = min(self.layers, 3)
        policy = Policy(counted, 0 if tile else counted, tile=tile, by_head=by_head)
        step = self.count(tokens, policy, False, rows, gradients=False)
        return self.mixed.add_to(splice_layers([Part(step, layers_to_copy(self.layers, counted, 1))]))

    def _layers_that_recompute(self, tokens: int, policy: Policy, accumulates: bool, rows: int, examples: int) -> Part:
        # The first ordinary layer. With offload it is layer 2: the input of layer 0 is the embedding's output, which
        # stays on the card.
        repeated = 2 if policy.offload else 1
        counted = min(self.layers, repeated + 2)
        step = self._count(tokens, replace(policy, layers=counted, kept=0), accumulates, rows, examples)
        if policy.kept and self.layout.sharded:
            # None of them is the model's last layer, which gathers itself in its backward pass.
            return Part(step, [min(i, max(0, counted - 2)) for i in range(policy.recomputed)])
        return Part(step, layers_to_copy(policy.recomputed, counted, repeated))

    def _layers_that_keep(self, tokens: int, policy: Policy, accumulates: bool, rows: int, examples: int) -> Part:
        counted = min(self.layers, 3)
        step = self._count(tokens, Policy(counted, counted), accumulates, rows, examples)
        copied = layers_to_copy(policy.kept, counted, 1)
        if policy.recomputed and counted > 2:  # none of them is the model's first layer
            copied = [max(1, i) for i in copied]
        return Part(step, copied)

    def count(
        self,
        tokens: int,
        policy: Policy,
        accumulates: bool,
        rows: int = 1,
        examples: int | None = None,
        *,
        gradients: bool = True,
    ) -> Step:
        """Counts the step of a model of `policy.layers` layers; gradients=False, as `forward`. Arguments as of `step`.

        It makes a new model each time: the first step may change one (bitsandbytes casts biases).
        """
        model, mode = self._fake_model(policy.layers)
        checkpoint_activations(model, policy)
        examples = examples or self.examples_in(tokens)
        if not self.layout.sharded:
            return self._count_with(model, mode, tokens, accumulates, rows, examples, gradients)
        with fake_process_group(self.layout.processes) as mesh:
            with mode:
                for layer in decoder_layers(model):
                    shard_layer(layer, mesh)
                shard_root(model, mesh)
            return self._count_with(model, mode, tokens, accumulates, rows, examples, gradients)

    def _fake_model(self, layers: int) -> tuple[PeftModel, FakeTensorMode]:
        recipe = self.recipe
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = fake_lora_model(
            recipe.model,
            recipe.lora,
            layers,
            mode,
            in_4bit=self.mixed.in_4bit,
            dtype=self.setting.dtype,
            attention=self.setting.attention,
            kernels=recipe.train.kernels,
        )
        return model, mode

    def _count_with(
        self,
        model: PeftModel,
        mode: FakeTensorMode,
        tokens: int,
        accumulates: bool,
        rows: int,
        examples: int,
        gradients: bool,
    ) -> Step:
        train, preference, dtype = self.recipe.train, self.recipe.preference, self.setting.dtype
        if train.optimizer == "paged_adamw_8bit":  # it moves pages to the host when it must; planned as if it never did
            train = replace(train, optimizer="adamw_8bit")
        optimizer = build_optimizer(model, train)  # not under the mode: bitsandbytes makes tables of values
        with mode, patch.object(torch, "is_autocast_enabled", _is_autocast_enabled):
            longest = min(tokens, train.seq_len) if self.packs else tokens // rows
            if self.packs and self.recipe.data.kind == "pairs":
                longest = -(-longest // 2)  # two answers alike share a row
            batch = full_batch(tokens, longest, examples, padding_free=self.packs)
            if preference is not None:
                batch |= preference_entries(batch["labels"].shape, preference, examples)

            def loss() -> torch.Tensor:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    if preference is None:
                        value: torch.Tensor = model(**batch, num_items_in_batch=tokens).loss
                    else:
                        value = preference_loss(model, batch, preference).loss / len(batch[SIGNS])
                return value

            def likelihoods() -> None:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    answer_likelihoods(model, batch)

            references = not self.setting.triton
            if not gradients:
                return count_forward(model, likelihoods, optimizer, references=references)
            return count_step(
                model,
                loss,
                optimizer,
                accumulates=accumulates,
                max_grad_norm=train.max_grad_norm,
                references=references,
            )


_stock_is_autocast_enabled = torch.is_autocast_enabled


def _is_autocast_enabled(device_type: str = "cpu") -> bool:
    """PEFT asks without naming a device, which asks about CUDA. Here the CPU's autocast stands in for it."""
    return _stock_is_autocast_enabled(device_type)


def assumed_examples(recipe: Recipe, tokens: int) -> int:
    """Examples in a row of so many tokens while its data are not known; of pairs both answers."""
    return max(least_examples(recipe), tokens // SHORT_EXAMPLE_TOKENS if tokens < LONG_ROW_TOKENS else 1)


def least_examples(recipe: Recipe) -> int:
    """Examples in a row that holds as few as it can; of pairs both answers."""
    return 2 if recipe.data.kind == "pairs" else 1


def full_batch(tokens: int, longest: int, examples: int = 1, *, padding_free: bool) -> dict[str, Any]:
    """A micro-batch in the form of common.data.batches.collate, every token trained.

    padding_free: int64 (1, tokens), as so many examples, for the scratch memory of attention, but with the attention of
    examples of `longest` tokens. Otherwise rows of `longest` tokens, int64 (tokens / longest, longest), which need a
    mask: the positions say that examples end in them. Raises ValueError where `longest` does not divide the tokens.
    """
    if not padding_free and tokens % longest:
        raise ValueError(f"{tokens} tokens are no rows of {longest}")
    shape = (1, tokens) if padding_free else (tokens // longest, longest)
    names = ("input_ids", "labels", "position_ids")
    batch: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
    batch["trained_positions"] = torch.zeros(tokens, dtype=torch.int64)
    if padding_free:
        starts = torch.zeros(examples + 1, dtype=torch.int32)
        batch |= {"cu_seq_lens_q": starts, "max_length_q": longest}
    return batch


def preference_entries(shape: tuple[int, ...], spec: PreferenceSpec, examples: int) -> dict[str, Any]:
    """What a micro-batch of full_batch has beside its other entries where the recipe has a PreferenceSpec.

    shape: of its labels. Of an odd number of examples it makes an even one.
    """
    examples += examples % 2
    entries: dict[str, Any] = {
        EXAMPLE_IDS: torch.zeros(shape, dtype=torch.int64),
        SIGNS: torch.ones(examples, dtype=torch.float32),
    }
    if spec.needs_reference:
        entries[REFERENCE] = torch.zeros(examples, dtype=torch.float64)
    if spec.kind == "rated":
        entries[KL] = torch.zeros((), dtype=torch.float64)
    return entries
