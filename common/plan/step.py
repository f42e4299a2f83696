"""One optimizer step as data: what it allocates and releases, moment by moment, and what it does meanwhile."""

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from common.machine.host_memory import page_locked_bytes
from common.machine.layout import RING_SLOTS
from common.plan.speed import Speed, Work

# What a byte is there for. A saved activation outlives the part of the forward pass that made it. All else that comes
# and goes is the working set of the moment.
WEIGHTS, EMBEDDINGS, ADAPTERS, GRADIENTS, OPTIMIZER, SAVED, GATHERED, WORKING = KINDS = (
    "weights",
    "embeddings, head, norms",
    "adapters",
    "gradients",
    "optimizer",
    "saved activations",
    "gathered layers",  # of layers that are sharded over several cards: the one that computes, and the next
    "working set",
)


class Event(NamedTuple):
    """One allocation or release."""

    kind: str
    delta: int  # bytes allocated (+) or released (-)
    allocated_in: str  # name of the segment that allocated them


@dataclass(frozen=True)
class Segment:
    """A part of the step: "embedding", "forward 0", ..., "head and loss", "loss", "backward 0", ..., "optimizer"."""

    name: str
    events: tuple[Event, ...]  # in order
    work: Work
    host_bytes: int  # of host memory that it takes, as torch rounds it, less what it gives back

    @cached_property
    def net(self) -> int:
        """Bytes that it allocates less bytes that it releases."""
        return sum(event.delta for event in self.events)

    @cached_property
    def levels(self) -> np.ndarray:
        """Bytes above those at its beginning, at first and after each event: int64 (events + 1,)."""
        return np.cumsum([0, *(event.delta for event in self.events)])

    @cached_property
    def rise(self) -> int:
        """Bytes at its worst moment above those at its beginning."""
        return int(self.levels.max())


@dataclass(frozen=True)
class Step:
    """One optimizer step: what is there before it, in bytes of each kind, and its segments in order."""

    resident_outside_layers: dict[str, int]
    resident_per_layer: dict[str, int]
    layers: int
    segments: tuple[Segment, ...]
    sharded_per_layer: dict[str, int] = field(default_factory=dict)  # of resident_per_layer, this card's shards
    shard_on_host: int = 0  # bytes that this card's shards of a layer take where they wait in host memory
    streamed_per_layer: int = 0  # bytes of a layer's frozen weights that wait in host memory where they stream
    streamed_at_most: int = 0  # of the largest layer

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of each kind that are there before the step."""
        return {
            kind: self.resident_outside_layers[kind] + self.layers * self.resident_per_layer[kind] for kind in KINDS
        }

    def with_layers_on_host(self, layers: int, cards: int = 1) -> "Step":
        """The step with this card's shards of so many layers in host memory, or with as many layers' weights there.

        A shard returns to the card for a moment, on its way to the other cards. It counts as if it were there at the
        worst moment. Weights of whole layers return to a ring, and those that lie in it at a turn are not copied
        (common.model.weight_streaming). cards: of a machine, which share those weights: each counts its part of them.
        """
        if not layers:
            return self
        outside = {
            kind: self.resident_outside_layers[kind] - layers * self.sharded_per_layer.get(kind, 0) for kind in KINDS
        }
        if any(self.sharded_per_layer.values()):
            shard = sum(self.sharded_per_layer.values())
            outside[GATHERED] += shard
            return self._with_copies(outside, shard * layers, layers * self.shard_on_host)
        streamed = self.streamed_per_layer
        outside[WEIGHTS] += RING_SLOTS * self.streamed_at_most - layers * streamed
        host_bytes = -(-layers * _host_block_bytes(streamed, cards) // cards)
        return self._with_copies(outside, streamed * max(0, layers - RING_SLOTS), host_bytes)

    def with_embedding_on_host(self, size: int, sent: int, cards: int = 1) -> "Step":
        """The step with the embedding in host memory (common.model.host_embedding).

        size: bytes of the embedding. sent: bytes of the rows of a micro-batch's tokens, which are gathered there first.
        cards: of a machine, which share the embedding: each counts its part of it.
        """
        outside = self.resident_outside_layers
        outside = outside | {EMBEDDINGS: outside[EMBEDDINGS] - size}
        first = self.segments[0]
        work = replace(first.work, link_bytes=first.work.link_bytes + sent)
        there = -(-_host_block_bytes(size, cards) // cards) + page_locked_bytes(sent)
        host_bytes = first.host_bytes + there
        segments = (replace(first, work=work, host_bytes=host_bytes), *self.segments[1:])
        return replace(self, resident_outside_layers=outside, segments=segments)

    def _with_copies(self, outside: dict[str, int], link_bytes: float, host_bytes: int) -> "Step":
        """The step with other bytes outside the layers, and with copies of so many bytes in each direction."""
        # The copies are spread evenly over all layers. A segment that is repeated stays one object: `peak_between`
        # looks at each object once.
        changed = {}
        for segment in {id(segment): segment for segment in self.segments}.values():
            is_layer = segment.name.startswith(("forward", "backward"))
            work = replace(segment.work, link_bytes=segment.work.link_bytes + is_layer * link_bytes / self.layers)
            changed[id(segment)] = replace(segment, work=work)
        segments = [changed[id(segment)] for segment in self.segments]
        segments[0] = replace(segments[0], host_bytes=segments[0].host_bytes + host_bytes)
        return replace(self, resident_outside_layers=outside, segments=tuple(segments))

    @property
    def has_backward(self) -> bool:
        """False for a forward pass without gradients."""
        return any(segment.name == "loss" for segment in self.segments)

    def segment(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    def timeline(self) -> Iterator[tuple[Segment, dict[str, int]]]:
        """Yields after every event: its segment, and the bytes of each kind. The dict is updated in place."""
        now = self.resident
        for segment in self.segments:
            for event in segment.events:
                now[event.kind] += event.delta
                yield segment, now

    def peak(self) -> int:
        """Bytes at the worst moment."""
        now = highest = sum(self.resident.values())
        for segment in self.segments:
            highest = max(highest, now + segment.rise)
            now += segment.net
        return highest

    def at_peak(self) -> dict[str, int]:
        """Bytes of each kind at the worst moment."""
        return max((now.copy() for _, now in self.timeline()), key=lambda now: sum(now.values()))

    def host_peak(self) -> int:
        """Bytes in host memory at the worst moment."""
        now = highest = 0
        for segment in self.segments:
            now += segment.host_bytes
            highest = max(highest, now)
        return highest

    def link_bytes(self) -> float:
        """Bytes that cross the link to the host and to other cards."""
        return sum(segment.work.link_bytes for segment in self.segments)

    def seconds(self, speed: Speed, micro_batches: int = 1) -> float:
        """Of one of the step's micro-batches, with its share of the optimizer's update, which comes once a step."""
        return sum(
            speed.seconds(segment.work) / (micro_batches if segment.name == "optimizer" else 1)
            for segment in self.segments
        )


def peak_between(counts: Sequence[Step], weights: Sequence[float]) -> int:
    """Bytes at the worst moment of a step between or beyond counts of the same step with other numbers of tokens.

    weights: of each count (lagrange_weights), together 1. The bytes of each event are a polynomial in the tokens, which
    two counts determine where it is a straight line, and three where it is a parabola. Where the counts have different
    numbers of events in a segment (the loss goes tile by tile), the segment's rise is taken for such a polynomial.
    """
    now = highest = float(sum(counts[0].resident.values()))
    rises: dict[tuple[int, ...], float] = {}
    for alike in zip(*(count.segments for count in counts), strict=True):
        key = tuple(map(id, alike))
        if key not in rises:
            same_events = len({len(segment.levels) for segment in alike}) == 1
            levels = np.array([segment.levels if same_events else [segment.rise] for segment in alike])
            rises[key] = float((np.array(weights) @ levels).max())
        highest = max(highest, now + rises[key])
        now += sum(weight * segment.net for weight, segment in zip(weights, alike, strict=True))
    return round(highest)


def lagrange_weights(at: float, counted: Sequence[float]) -> list[float]:
    """The weight of each counted point in the polynomial's value at `at`: Lagrange's form, as many points as terms."""
    return [math.prod((at - other) / (point - other) for other in counted if other != point) for point in counted]


def _host_block_bytes(size: int, cards: int) -> int:
    """What weights of so many bytes take of host memory, for all cards of a machine (common.machine.shared_memory)."""
    return page_locked_bytes(size) if cards == 1 else -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
