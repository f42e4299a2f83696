"""Searches the fastest way to run a recipe's optimizer step on a card: micro-batch, recompute, what waits on the host.

Rows per optimizer step is the contract of a recipe: micro-batch rows x accumulation x processes always equals it.
Memory is counted (common.plan.forecast), not estimated. Time is a roofline estimate (common.plan.speed).
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from common.machine.layout import ONE_PROCESS, RING_SLOTS, Layout
from common.model.activation_checkpointing import Policy
from common.model.config import load_config, refuse_more_positions
from common.plan.card import Card
from common.plan.forecast import LONG_ROW_TOKENS, Forecast, Setting, least_examples
from common.plan.speed import speed_of
from common.plan.step import GRADIENTS, Step, lagrange_weights, peak_between
from common.recipe import Checkpointing, Recipe, UserError, rows_per_process

MAX_MICRO_BATCH_TOKENS = 16_384  # past it nothing gets faster, so a plan looks no further
# Tokens of single rows that give the parabola of an attention with a mask; each is more than a tile of logits.
COUNTED_LENGTHS = (4_096, 8_192, 16_384)
# Ways to compute long rows, from fast to lean: fields of Policy. Smaller tiles take longer: with 4,096 tokens a matmul
# computes as long as the reading of its weight takes many times over.
TILES: tuple[dict[str, Any], ...] = (
    {"tile": 4_096},
    {"tile": 4_096, "by_head": True},
    {"tile": 1_024, "by_head": True},
    {"tile": 1_024, "by_head": True, "qkv_again": True},
)
# torch's memory-efficient attention finds the entries of a mask by offsets of 32 bits: beyond 2^31 of them its backward
# pass fails, beyond 2^32 its output is wrong without a word (github.com/pytorch/pytorch issues 147585, 162588, 187227).
MAX_ROW_WITH_MASK = math.isqrt(2**31 - 1)  # tokens: 46,340
TIME_TOLERANCE = 1.02  # options whose modelled times differ by less than this factor take the same time
TRAFFIC_TOLERANCE = 1.1  # options whose traffic differs by about less than this factor send as much


@dataclass(frozen=True)
class Option:
    """One way to run the step."""

    rows: int  # of a micro-batch
    policy: Policy
    peak: int  # bytes
    seconds_per_token: float
    on_host: int = 0  # layers whose shards, or whose frozen weights where layers are whole, wait in host memory
    host_bytes: int = 0  # in host memory
    link_bytes_per_token: float = 0.0  # to and from the host, and to and from other cards
    embedding_on_host: bool = False  # of whole layers
    instead: str = ""  # the other way to lay the model over the cards, and why the plan did not take it


class Planner:
    """The options of one recipe on one card.

    Every allocation of a step is a straight line in the tokens of the micro-batch. So the search counts each policy at
    two numbers of tokens and interpolates. What it chooses is counted again as it is. An attention that is not packed
    has a mask: a straight line in the rows of the micro-batch, a parabola in the length of a row.
    """

    def __init__(
        self, recipe: Recipe, card: Card, setting: Setting | None = None, layout: Layout = ONE_PROCESS
    ) -> None:
        self.recipe, self.seq_len, self.layout = recipe, recipe.train.seq_len, layout
        self.rows_here = rows_per_process(recipe.train, layout.processes)
        refuse_more_positions(recipe)
        refuse_weights_on_host(recipe)
        if recipe.train.embedding_on_host is True and not layout.sharded:
            self.layout = layout = replace(layout, embedding_on_host=True)
        self.forecast = Forecast(recipe, setting or Setting(), speed_of(card.gpu), layout, card.cards)
        if not self.forecast.packs and self.seq_len > MAX_ROW_WITH_MASK:
            raise UserError(
                f"TrainSpec.seq_len is {self.seq_len:,}. This GPU has no flash attention, and attention with a mask is "
                f"wrong in torch beyond {MAX_ROW_WITH_MASK:,} tokens: lower seq_len, or take a card of the RTX 30 "
                f"series or newer"
            )
        self.layers = self.forecast.layers
        other_stream = self.forecast.gathered_layer_bytes()
        self.card = replace(card, uses_nccl=layout.processes > 1, other_stream_bytes=other_stream)
        # DistributedDataParallel sends gradients in buckets of its own, which take as much memory as the gradients.
        self.bucket_bytes = 0
        if layout.processes > 1 and not layout.sharded:
            self.bucket_bytes = self.forecast.step(self.seq_len, Policy(self.layers)).resident[GRADIENTS]
        self.pass_seconds_per_token = cache(self._pass_seconds_per_token)
        # In full rows, which is all that an attention with a mask can be counted in.
        self.counted_tokens = self.seq_len, self.seq_len * max(2, MAX_MICRO_BATCH_TOKENS // self.seq_len)

    def with_embedding(self, *, on_host: bool) -> "Planner":
        """The planner of options with the embedding in host memory, or on the card. The two share their counts."""
        if on_host == self.layout.embedding_on_host:
            return self
        other = copy.copy(self)
        other.layout = replace(self.layout, embedding_on_host=on_host)
        other.forecast = self.forecast.with_embedding(on_host=on_host)
        other.pass_seconds_per_token = cache(other._pass_seconds_per_token)
        return other

    def leaner(self) -> "Planner":
        """The planner of options with the embedding in host memory, where the recipe and the model allow it."""
        may = self.recipe.train.embedding_on_host == "auto" and not self.layout.sharded and not self.is_tied
        return self.with_embedding(on_host=True) if may else self

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the head too."""
        return bool(load_config(self.recipe.model).tie_word_embeddings)

    def choose(self, *, streams: bool = True) -> Option | None:
        """The fastest option that fits, under the recipe's own policy if it names one. None when not even one row fits.

        Of several cards that share a model, the option that sends least, among those that are about as fast. Weights
        of whole layers stream where nothing fits otherwise: first the embedding alone, which sends the least, then
        layers too. streams=False: not even then, unless the recipe says so.
        """
        choices, leaner = self.offload_choices(), self.leaner()
        if self.layout.sharded:
            return self._choose_among(choices)
        if len(choices) == 1:  # the recipe's
            option = self._choose_among(choices)
            return leaner._choose_among(choices) if option is None and choices[0] and leaner is not self else option
        if (option := self._choose_among([0])) or not streams:
            return option
        alone = leaner._choose_among([0]) if leaner is not self else None
        return alone or leaner._choose_among(choices[1:])

    def choose_with(self, on_host: int) -> Option | None:
        """The fastest option that fits with the shards, or weights, of so many layers in host memory, as they are."""
        return self._choose_among([on_host])

    def _choose_among(self, choices: Sequence[int]) -> Option | None:
        """choices: how many layers may have their shards, or weights, in host memory; ascending."""
        if not choices:
            return None
        leanest = self.forecast.step(self.seq_len, Policy(self.layers), on_host=choices[-1])
        if sum(leanest.resident.values()) > self.card.budget:
            return None  # no need to search
        for candidates in (self._candidates(choices), self._candidates_in_tiles(choices)):
            for option in self._rank(option for option in candidates if option):
                exact, _ = self.exact(option.rows, option.policy, option.on_host)
                if self.fits(exact):
                    return self._move_layers_to_card(exact, choices)
        return None

    def _candidates_in_tiles(self, choices: Sequence[int]) -> Iterator[Option]:
        """The options that compute in tiles: only where nothing else fits, so that other rows stay as they are."""
        policies = self.policies_in_tiles(self.recipe.train.checkpointing)
        leanest = policies[len(TILES) - 1 :: len(TILES)]
        row = self.forecast.examples_per_row
        if not any(self.fits(self._extrapolate(self.seq_len, policy, choices[-1], row)) for policy in leanest):
            return  # no need to search
        groups = [policies[start : start + len(TILES)] for start in range(0, len(policies), len(TILES))]
        for rows, group in product(self._micro_batch_rows(), groups):
            for policy in group:
                tokens, examples = rows * self.seq_len, row if rows == 1 else None
                fitting = (n for n in choices if self.fits(self._extrapolate(tokens, policy, n, examples)))
                if (on_host := next(fitting, None)) is None:
                    continue
                option, _ = self.exact(rows, policy, on_host)
                yield option
                if on_host == choices[0] and self.fits(option):
                    break  # the leaner ones take longer

    def policies_in_tiles(self, wanted: Checkpointing) -> list[Policy]:
        """The policies in tiles that TrainSpec.checkpointing allows, from fast to lean."""
        if wanted == "none" or not self.forecast.can_tile:
            return []
        names: list[Checkpointing] = ["every layer", "offload"] if wanted == "auto" else [wanted]
        plain = [Policy.named(name, self.layers) for name in names]
        return [replace(policy, **tiles) for policy in plain for tiles in TILES]

    def leanest(self, wanted: Checkpointing, on_host: int) -> tuple[Option, Step]:
        """One row under that of the policies which TrainSpec.checkpointing allows that takes the least memory."""
        plain = Policy.named("offload" if wanted == "auto" else wanted, self.layers)
        policies = [plain, *self.policies_in_tiles(wanted)[-1:]]  # tiles take more where a row is shorter than one
        return min((self.exact(1, policy, on_host) for policy in policies), key=lambda pair: pair[0].peak)

    def _candidates(self, choices: Sequence[int]) -> Iterator[Option | None]:
        """For each micro-batch and each number of layers on the host the options worth comparing; None for a misfit."""
        wanted = self.recipe.train.checkpointing
        for rows, on_host in product(self._micro_batch_rows(), choices):
            if wanted != "auto":
                named = self.interpolate(rows, Policy.named(wanted, self.layers), on_host)
                yield named if self.fits(named) else None
                continue
            plain = self.keep_most_layers(rows, on_host)
            yield plain
            if plain is None or plain.policy.recomputed:
                yield self.keep_most_layers(rows, on_host, offload=True)
                if self.seq_len >= LONG_ROW_TOKENS:  # attention is a large enough part of a layer to be worth keeping
                    yield self.keep_most_layers(rows, on_host, keep_attention=True)

    def _micro_batch_rows(self) -> list[int]:
        """The divisors of this process's rows, up to MAX_MICRO_BATCH_TOKENS."""
        most = max(1, MAX_MICRO_BATCH_TOKENS // self.seq_len)
        return [rows for rows in range(1, self.rows_here + 1) if self.rows_here % rows == 0 and rows <= most]

    def offload_choices(self) -> list[int]:
        """How many layers the search lets have their shards, or weights, in host memory, ascending.

        Every eighth of all, or the one number that the recipe names.
        """
        eighths = {self.layers * eighths // 8 for eighths in range(9)}
        wanted = self.recipe.train.weights_on_host
        if self.layout.sharded:
            return sorted(eighths)
        if wanted != "auto":
            return [wanted]
        return [0, *sorted(count for count in eighths if count > RING_SLOTS)]

    def keep_most_layers(self, rows: int, on_host: int = 0, **extras: bool) -> Option | None:
        """The option in which the most layers keep their activations. None where recomputing every layer does not fit.

        extras: fields of Policy, for the layers that recompute.
        """
        fewest_recomputed = min(3, self.layers) if extras.get("offload") else 0  # Forecast.step refuses fewer
        low, high = 0, self.layers - fewest_recomputed  # layers that keep their activations
        best = self.interpolate(rows, Policy(self.layers, low, **extras), on_host)
        if not self.fits(best):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            option = self.interpolate(rows, Policy(self.layers, middle, **extras), on_host)
            if self.fits(option):
                best, low = option, middle
            else:
                high = middle - 1
        return best

    def _rank(self, options: Iterable[Option]) -> list[Option]:
        """The options from best to worst: the fastest first.

        Where cards share a model, or weights stream, those that the model of time cannot tell from the fastest come
        first, the one that sends least at their head; options that send as much stay in the order of their times.
        """
        by_time = sorted(options, key=lambda option: option.seconds_per_token)
        if not by_time or not self.layout.sharded and not by_time[0].on_host:
            return by_time
        slow = TIME_TOLERANCE * by_time[0].seconds_per_token
        return sorted(by_time, key=lambda option: (option.seconds_per_token > slow, _traffic_class(option)))

    def _move_layers_to_card(self, option: Option, choices: Sequence[int]) -> Option:
        """The option with as few layers on the host as fit; the search tries eighths only."""
        low, high = min(choices), option.on_host
        if not self.layout.sharded and len(choices) > 1:
            low = min(high, RING_SLOTS + 1)
        while low < high:
            middle = (low + high) // 2
            fewer, _ = self.exact(option.rows, option.policy, middle)
            if self.fits(fewer):
                option, high = fewer, middle
            else:
                low = middle + 1
        return option

    def fits(self, option: Option) -> bool:
        fits_host = self.card.host_bytes is None or option.host_bytes <= self.card.host_bytes
        return option.peak <= self.card.budget and fits_host

    def interpolate(self, rows: int, policy: Policy, on_host: int = 0) -> Option:
        """The option, its peak and time between those of two counts."""
        tokens, speed = rows * self.seq_len, self.forecast.speed
        counts = [
            self.forecast.step(counted, policy, rows=counted // self.seq_len, on_host=on_host)
            for counted in self.counted_tokens
        ]
        weights = lagrange_weights(tokens, self.counted_tokens)
        pairs = list(zip(weights, counts, strict=True))
        seconds = sum(weight * count.seconds(speed, self.rows_here // rows) for weight, count in pairs)
        host = round(sum(weight * count.host_peak() for weight, count in pairs))
        sent = sum(weight * count.link_bytes() for weight, count in pairs)
        peak = peak_between(counts, weights) + self.bucket_bytes
        seconds_per_token = seconds / tokens + self.pass_seconds_per_token(on_host)
        there = self.layout.embedding_on_host
        return Option(rows, policy, peak, seconds_per_token, on_host, host, sent / tokens, there)

    def exact(self, rows: int, policy: Policy, on_host: int = 0) -> tuple[Option, Step]:
        """The option counted as it is, and its step."""
        tokens, accumulates = rows * self.seq_len, rows < self.rows_here
        step = self.forecast.step(tokens, policy, rows=rows, accumulates=accumulates, on_host=on_host)
        seconds = step.seconds(self.forecast.speed, self.rows_here // rows)
        peak = step.peak() + self.bucket_bytes
        seconds_per_token = seconds / tokens + self.pass_seconds_per_token(on_host)
        host, sent, there = step.host_peak(), step.link_bytes() / tokens, self.layout.embedding_on_host
        return Option(rows, policy, peak, seconds_per_token, on_host, host, sent, there), step

    @property
    def needs_reference(self) -> bool:
        return self.recipe.preference is not None and self.recipe.preference.needs_reference

    def reference_rows(self, on_host: int = 0) -> int:
        """Rows of the largest micro-batch up to MAX_MICRO_BATCH_TOKENS that fits without gradients, at least 1.

        0 where the recipe has no reference. Where a step fits, one row does: its backward pass takes more.
        """
        if not self.needs_reference:
            return 0
        most = max(1, MAX_MICRO_BATCH_TOKENS // self.seq_len)
        fits = (rows for rows in range(most, 1, -1) if self.forward_peak(rows, on_host) <= self.card.budget)
        return next(fits, 1)

    def forward_peak(self, rows: int, on_host: int = 0, policy: Policy | None = None) -> int:
        """Bytes at the worst moment of a forward pass without gradients, beside what a step keeps.

        policy: whose tiles it computes in; None is without.
        """
        tile, by_head = (0, False) if policy is None else (policy.tile, policy.by_head)
        step = self.forecast.forward(rows * self.seq_len, rows=rows, on_host=on_host, tile=tile, by_head=by_head)
        return step.peak() + self.bucket_bytes

    def _pass_seconds_per_token(self, on_host: int = 0) -> float:
        """Of what a loss with a reference computes without gradients, for each token that is trained; else 0.

        Before the first step each row once. KTO computes it with answers to other prompts too, and these again in each
        optimizer step.
        """
        if not self.needs_reference:
            return 0.0
        rated, rows = self.recipe.data.kind == "rated", self.reference_rows(on_host)
        passes = 2 / self.recipe.train.epochs + 1 if rated else 1 / self.recipe.train.epochs
        tokens = rows * self.seq_len
        return passes * self.forecast.forward(tokens, rows=rows, on_host=on_host).seconds(self.forecast.speed) / tokens

    def longest_row(self, policy: Policy, on_host: int = 0, examples: int | None = None) -> int:
        """Tokens of the longest single row that fits card and host, a multiple of 256. 0 where none fits.

        It does not ask how many positions the model has. examples: in the row; None is one, or one pair.
        """
        return self.longest_option(policy, on_host, examples)[0]

    def longest_option(self, policy: Policy, on_host: int = 0, examples: int | None = None) -> tuple[int, Option]:
        """The tokens of longest_row, and what that row takes."""
        # Without tiles attention is not the worst moment, so the counts that the search has made do as well.
        if examples is None and policy.tile:
            examples = least_examples(self.recipe)
        low, high = 0, 1 << 14 if self.forecast.packs else MAX_ROW_WITH_MASK // 256  # multiples of 256
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(self._extrapolate(256 * middle, policy, on_host, examples)):
                low = middle
            else:
                high = middle - 1
        return 256 * low, self._extrapolate(256 * low, policy, on_host, examples)

    def _extrapolate(self, tokens: int, policy: Policy, on_host: int, examples: int | None) -> Option:
        """So many tokens and examples from counts of other lengths, as one row, without the time.

        examples: None is as many for the tokens as in the data.
        """
        lengths: tuple[int, ...] = self.counted_tokens
        if not self.forecast.packs:
            lengths = COUNTED_LENGTHS
        elif policy.tile:  # full tiles, and so many that all further ones are like them
            lengths = 4 * policy.tile, 8 * policy.tile
        counts = [self.forecast.step(counted, policy, examples=examples, on_host=on_host) for counted in lengths]
        weights = lagrange_weights(tokens, lengths)
        host = round(sum(weight * count.host_peak() for weight, count in zip(weights, counts, strict=True)))
        peak, there = peak_between(counts, weights) + self.bucket_bytes, self.layout.embedding_on_host
        return Option(1, policy, peak, 0.0, on_host, host, embedding_on_host=there)


def refuse_weights_on_host(recipe: Recipe) -> None:
    """Raises UserError where the recipe lets weights wait in host memory that the model does not have, or cannot move.

    These are those of more layers than there are, and an embedding that is the head too.
    """
    config, wanted = load_config(recipe.model), recipe.train.weights_on_host
    if wanted != "auto" and wanted > config.num_hidden_layers:
        raise UserError(f"TrainSpec.weights_on_host is {wanted}, and the model has {config.num_hidden_layers} layers")
    if recipe.train.embedding_on_host is True and config.tie_word_embeddings:
        raise UserError(
            f"TrainSpec.embedding_on_host is True, and the embedding of {recipe.model.name} is its head too (tied), "
            "which the card reads: leave it out"
        )


def _traffic_class(option: Option) -> int:
    """A number that options share which send about as much: the traffic in powers of TRAFFIC_TOLERANCE, rounded."""
    return round(math.log(option.link_bytes_per_token, TRAFFIC_TOLERANCE))
