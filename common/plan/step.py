"""One optimizer step as data: what is allocated and released in it, moment by moment, and how long it takes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

# What a byte is there for. A saved activation outlives the part of the forward pass that made it; everything else that
# comes and goes is the working set of the moment.
WEIGHTS, EMBEDDINGS, ADAPTERS, GRADIENTS, OPTIMIZER, SAVED, GATHERED, WORKING = KINDS = (
    "weights",
    "embeddings, head, norms",
    "adapters",
    "gradients",
    "optimizer",
    "saved activations",
    "gathered layers",  # of layers that are cut over several cards: the one that computes, and the next
    "working set",
)


@dataclass(frozen=True)
class Speed:
    """A machine, as far as the time of a step depends on it."""

    name: str
    flops: float  # a second, dense 16-bit matmul
    bandwidth: float  # bytes a second, of the GPU's memory
    # Bytes a second each way, to the host and to other cards; PCIe 4.0 x16 moves about 25 of its 32 GB/s.
    host_link: float = 25e9
    launch: float = 6e-6  # seconds of Python and dispatch an operator; assumed, not measured

    def seconds(self, work: "Work") -> float:
        """Each operator takes as long as its slower side; copies over the link and launching go on beside it."""
        operators = float((work.table / (self.flops, self.bandwidth)).max(axis=1).sum())
        return max(operators, work.link_bytes / self.host_link, work.launches * self.launch)


@dataclass
class Work:
    """What a segment does."""

    operators: list[tuple[float, float]] = field(default_factory=list)  # FLOP of its matmul, bytes it reads and writes
    link_bytes: float = 0.0  # to and from the host, and from other cards
    launches: int = 0

    @cached_property
    def table(self) -> np.ndarray:
        """The operators as float64 (operators, 2), once they are all there."""
        return np.array(self.operators, dtype=np.float64).reshape(-1, 2)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.operators)

    def scaled(self, factor: float) -> "Work":
        operators = [(flops * factor, size * factor) for flops, size in self.operators]
        return Work(operators, self.link_bytes * factor, int(self.launches * factor))


@dataclass(frozen=True)
class Segment:
    """A part of the step. Events, in order: kind, bytes allocated (+) or released (-), segment that allocated them."""

    name: str
    events: tuple[tuple[str, int, str], ...]
    work: Work
    host_bytes: int  # that stay in host memory after it, less those that return

    @cached_property
    def net(self) -> int:
        return sum(delta for _, delta, _ in self.events)

    @cached_property
    def levels(self) -> np.ndarray:
        """Bytes above those at its beginning, at first and after each event: int64 (events + 1,)."""
        return np.cumsum([0, *(delta for _, delta, _ in self.events)])

    @cached_property
    def rise(self) -> int:
        """How far above its beginning the segment gets, in bytes."""
        return int(self.levels.max())


@dataclass(frozen=True)
class Step:
    """One optimizer step: what is there before it, and its segments in order."""

    outside: dict[str, int]  # bytes of each kind that are there before the step, outside the layers
    of_layer: dict[str, int]  # the same, of one layer
    layers: int
    segments: tuple[Segment, ...]
    cut: dict[str, int] = field(default_factory=dict)  # of of_layer, what is this card's part of a cut layer

    @property
    def base(self) -> dict[str, int]:
        return {kind: self.outside[kind] + self.layers * self.of_layer[kind] for kind in KINDS}

    def with_parts_on_host(self, layers: int) -> "Step":
        """The step with this card's parts of so many layers in host memory.

        A part on its way to the others is on the card for a moment; it counts as if it were at the worst one.
        """
        if not layers:
            return self
        part = sum(self.cut.values())
        outside = {kind: self.outside[kind] - layers * self.cut.get(kind, 0) for kind in KINDS}
        outside[GATHERED] += part
        crossing = {}
        for segment in {id(segment): segment for segment in self.segments}.values():
            of_layer = segment.name.startswith(("forward", "backward"))
            work = replace(segment.work, link_bytes=segment.work.link_bytes + of_layer * part * layers / self.layers)
            crossing[id(segment)] = replace(segment, work=work)
        segments = [crossing[id(segment)] for segment in self.segments]
        segments[0] = replace(segments[0], host_bytes=segments[0].host_bytes + layers * part)
        return replace(self, outside=outside, segments=tuple(segments))

    def segment(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    def left_behind(self, name: str) -> tuple[tuple[str, int, str], ...]:
        """What the segment releases for each layer: what it does for the first, which is too far away for anything that
        merely goes out of scope there (autocast's copies of the adapters, at the end of the forward pass)."""
        return tuple(event for event in self.segment(name).events if event[1] < 0 and event[2] == "forward 0")

    def from_before(self, name: str) -> list[tuple[str, int, str]]:
        """What the segment releases that was there before the layers."""
        return [event for event in self.segment(name).events if event[1] < 0 and event[2] == "embedding"]

    def timeline(self) -> Iterator[tuple[Segment, dict[str, int]]]:
        """After every allocation and release: where it happened, and the bytes of each kind."""
        now = self.base
        for segment in self.segments:
            for kind, delta, _ in segment.events:
                now[kind] += delta
                yield segment, now

    def peak(self) -> int:
        """Bytes at the worst moment."""
        now = highest = sum(self.base.values())
        for segment in self.segments:
            highest = max(highest, now + segment.rise)
            now += segment.net
        return highest

    def at_peak(self) -> dict[str, int]:
        """Bytes of each kind at the worst moment."""
        return max((now.copy() for _, now in self.timeline()), key=lambda now: sum(now.values()))

    def host_peak(self) -> int:
        """The most bytes that wait in host memory."""
        now = most = 0
        for segment in self.segments:
            now += segment.host_bytes
            most = max(most, now)
        return most

    def sent(self) -> float:
        """Bytes that cross the link."""
        return sum(segment.work.link_bytes for segment in self.segments)

    def seconds(self, speed: Speed) -> float:
        return sum(speed.seconds(segment.work) for segment in self.segments)


def peak_between(first: Step, second: Step, share: float) -> int:
    """Bytes at the worst moment of a step between two counts of the same step (share 0 to 1), or beyond them.

    Each event is a straight line in the tokens of the micro-batch; a segment with another number of events (the loss
    goes tile by tile) is taken as a whole.
    """
    now = highest = float(sum(first.base.values()))
    rises: dict[tuple[int, int], float] = {}
    for a, b in zip(first.segments, second.segments, strict=True):
        key = id(a), id(b)
        if key not in rises:
            same = len(a.levels) == len(b.levels)
            rises[key] = (
                (a.levels + share * (b.levels - a.levels)).max() if same else a.rise + share * (b.rise - a.rise)
            )
        highest = max(highest, now + rises[key])
        now += a.net + share * (b.net - a.net)
    return int(highest)


def splice(parts: Sequence[tuple[Step, Sequence[int]]]) -> Step:
    """One step whose layers are copies of layers of others: of each part, in order, the layers with these numbers.

    The last part gives what lies outside the layers, and the number of its layers must be right there or its layers
    leave nothing behind.
    """
    (first, _), (last, _) = parts[0], parts[-1]
    layers = sum(len(origin) for _, origin in parts)

    def outside(name: str) -> Segment:
        segment = last.segment(name)
        events = list(segment.events)
        # A mask that the last layers do not need after the forward pass stays while the first ones want it.
        for event in (Counter(last.from_before(name)) - Counter(first.from_before(name))).elements():
            events.remove(event)
        released = [
            event
            for step, origin in parts
            for event in step.left_behind(name) * (len(origin) - (step.layers if step is last else 0))
        ]
        work = segment.work.scaled(layers / last.layers) if name == "optimizer" else segment.work
        return Segment(name, (*events, *released), work, segment.host_bytes)

    forward = [step.segment(f"forward {i}") for step, origin in parts for i in origin]
    backward = [step.segment(f"backward {i}") for step, origin in parts for i in origin]
    middle = [outside(name) for name in ("head and loss", "loss")]
    segments = [first.segment("embedding"), *forward, *middle, *reversed(backward), outside("optimizer")]
    return Step(last.outside, last.of_layer, layers, tuple(segments), last.cut)
