"""The step of a deep model from the counts of shallow ones: the segments of a few layers, repeated."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from common.plan.step import Event, Segment, Step


@dataclass(frozen=True)
class Part:
    """Consecutive layers of the deep model, each a copy of a layer of one counted step."""

    step: Step
    copied: Sequence[int]  # for each layer of the deep model, the number of the counted layer that it copies


def layers_to_copy(layers: int, counted: int, repeated: int) -> list[int]:
    """Which of `counted` layers each of `layers` layers copies.

    The first and the last layers copy the first and the last ones; the layer `repeated` stands for all between.
    """
    if layers <= counted:
        return [*range(layers - 1), counted - 1]
    return [*range(repeated), *[repeated] * (layers - counted), *range(repeated, counted)]


def splice_layers(parts: Sequence[Part]) -> Step:
    """The step of a model whose layers are those of the parts, in order; of steps without a backward pass one without.

    What lies outside the layers comes from the last part. The last part must have as many layers as its counted step,
    or more.
    """
    first, last = parts[0].step, parts[-1].step
    layers = sum(len(part.copied) for part in parts)
    forward = [part.step.segment(f"forward {number}") for part in parts for number in part.copied]
    head = _segment_outside("head and loss", parts, layers)
    segments: tuple[Segment, ...] = (first.segment("embedding"), *forward, head)
    if last.has_backward:
        backward = [part.step.segment(f"backward {number}") for part in parts for number in part.copied]
        loss, optimizer = (_segment_outside(name, parts, layers) for name in ("loss", "optimizer"))
        segments += (loss, *reversed(backward), optimizer)
    return Step(
        last.resident_outside_layers,
        last.resident_per_layer,
        layers,
        segments,
        last.sharded_per_layer,
        last.shard_on_host,
        last.streamed_per_layer,
        last.streamed_at_most,
    )


def _segment_outside(name: str, parts: Sequence[Part], layers: int) -> Segment:
    """A segment behind the layers, with the releases that belong to all layers of the deep model."""
    first, last = parts[0].step, parts[-1].step
    segment = last.segment(name)
    events = list(segment.events)
    # Where the last layers need a mask no longer after the forward pass, but the first ones do, the mask stays.
    too_early = Counter(_releases(last, name, "embedding")) - Counter(_releases(first, name, "embedding"))
    for event in too_early.elements():
        events.remove(event)
    # What the segment releases for one layer, it releases for each copy of that layer too. What it releases for the
    # first one stands for all: for the last ones it also releases tensors that merely go out of scope there.
    for part in parts:
        already_there = last.layers if part.step is last else 0
        events += _releases(part.step, name, "forward 0") * (len(part.copied) - already_there)
    work = segment.work.scaled(layers / last.layers) if name == "optimizer" else segment.work
    return Segment(name, tuple(events), work, segment.host_bytes)


def _releases(step: Step, name: str, allocated_in: str) -> list[Event]:
    """What the segment of this name releases of what another one allocated.

    For example autocast's 16-bit copies of the adapters: a layer's forward pass makes them, "head and loss" releases
    them, at the end of the forward pass.
    """
    return [event for event in step.segment(name).events if event.delta < 0 and event.allocated_in == allocated_in]
