"""Small steps written by hand, for the arithmetic of peaks and splices."""

from common.plan.speed import Work
from common.plan.step import KINDS, WEIGHTS, WORKING, Event, Segment, Step


def segment(name: str, *deltas: tuple[int, str], seconds: float = 0.0, host: int = 0) -> Segment:
    """deltas: bytes up and down, and the segment that allocated them."""
    events = tuple(Event(WORKING, delta, allocated_in) for delta, allocated_in in deltas)
    return Segment(name, events, Work([(seconds, 0.0)]), host)


def by_hand(*segments: Segment) -> Step:
    """A step of one layer, with 100 bytes of weights outside it and 10 in it."""
    return Step(dict.fromkeys(KINDS, 0) | {WEIGHTS: 100}, dict.fromkeys(KINDS, 0) | {WEIGHTS: 10}, 1, segments)
