"""Copies on a stream of their own, and the poisoned clock that tests them: each wait that is missing does harm."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from common.machine.copy_stream import CopyStream
from common.machine.host_memory import empty_on_host
from tests.poisoned_clock import PoisonedClock

CPU = torch.device("cpu")


def ones() -> Tensor:
    return torch.ones(3, 4)


def test_without_streams_a_copy_is_done_when_it_is_begun():
    copies, target = CopyStream(CPU), torch.zeros(3, 4)
    copies.copy(target, ones())
    assert torch.equal(target, ones())
    copies.wait()
    copies.synchronize()


@pytest.mark.parametrize("wait", [CopyStream.wait, CopyStream.synchronize, lambda _: torch.cuda.synchronize()])
def test_a_copy_is_there_when_it_was_waited_for_and_not_before(wait):
    with PoisonedClock() as clock:
        copies, source, target = CopyStream(CPU), ones(), torch.empty(3, 4)
        copies.copy(target, source)
        assert target.isnan().all()
        wait(copies)
        assert torch.equal(target, source)
    assert clock.copies == 1


def test_copies_keep_their_order_and_a_buffer_is_overwritten_by_the_next_one():
    with PoisonedClock():
        copies, first, second, buffer, result = CopyStream(CPU), ones(), 2 * ones(), torch.empty(3, 4), ones()
        copies.copy(buffer, first)
        copies.copy(result, buffer)
        copies.copy(buffer, second)
        copies.wait()
        assert torch.equal(result, first) and torch.equal(buffer, second)


def on_own_stream(target: Tensor, source: Tensor, *, after_computation: bool = True) -> torch.cuda.Stream:
    stream = torch.cuda.Stream()
    if after_computation:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    return stream


def wait_for(stream: torch.cuda.Stream) -> None:
    torch.cuda.current_stream().wait_stream(stream)


def read_too_early() -> Tensor:
    target = torch.empty(3, 4)
    stream = on_own_stream(target, ones_kept)
    result = target + 1
    wait_for(stream)
    return result


def source_changed_too_early() -> Tensor:
    target, source = torch.empty(3, 4), ones()
    stream = on_own_stream(target, source)
    source.mul_(5)
    wait_for(stream)
    return target


def source_freed_too_early() -> Tensor:
    target, source = torch.empty(3, 4), ones()
    stream = on_own_stream(target, source)
    del source
    wait_for(stream)
    return target


def source_not_computed() -> Tensor:
    target, source = torch.empty(3, 4), ones()
    wait_for(stream := on_own_stream(target, source, after_computation=False))
    assert stream.query()
    return target


def target_still_read() -> Tensor:
    """As in a ring of buffers: a layer reads the one that the weights of a later layer are copied to."""
    buffer, stream = ones_kept.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    buffer @ torch.ones(4, 4)
    with torch.cuda.stream(stream):
        buffer.copy_(host_weights, non_blocking=True)
    wait_for(stream)
    return buffer


def waited_for_the_copy_before() -> Tensor:
    first, second = torch.empty(3, 4), torch.empty(3, 4)
    stream = on_own_stream(first, ones_kept)
    event = stream.record_event()
    with torch.cuda.stream(stream):
        second.copy_(host_weights, non_blocking=True)
    torch.cuda.current_stream().wait_event(event)
    assert torch.equal(first, ones_kept)
    result = second.clone()
    stream.synchronize()
    return result


def other_stream_not_waited_for() -> Tensor:
    """Reads the buffer that another copy stream fills."""
    buffer, result = torch.empty(3, 4), torch.empty(3, 4)
    filling = on_own_stream(buffer, ones_kept)
    wait_for(on_own_stream(result, buffer))
    wait_for(filling)
    return result


ones_kept, host_weights = ones(), 2 * ones()
FAULTS = [
    read_too_early,
    source_freed_too_early,
    source_not_computed,
    target_still_read,
    waited_for_the_copy_before,
    other_stream_not_waited_for,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_not_waited_for_is_nan(fault: Callable[[], Tensor]):
    with PoisonedClock():
        assert fault().isnan().all()


def test_a_source_that_is_changed_too_early_changes_the_copy():
    with PoisonedClock():
        assert torch.equal(source_changed_too_early(), 5 * ones())


@pytest.mark.parametrize("wait", [CopyStream.wait, CopyStream.synchronize], ids=["the computation", "the host"])
def test_the_host_may_not_fill_a_buffer_again_before_it_has_waited_itself(wait):
    is_harm = wait is CopyStream.wait
    expected = pytest.raises(AssertionError, match="the host reads or changes") if is_harm else nullcontext()
    with expected, PoisonedClock():
        copies, target = CopyStream(CPU), torch.empty(4, dtype=torch.uint8)
        buffer = empty_on_host(4, target)
        buffer.fill_(1)
        copies.copy(target, buffer)
        wait(copies)
        buffer.fill_(2)


def test_integers_are_poisoned_too():
    with PoisonedClock():
        copies, target = CopyStream(CPU), torch.empty(8, dtype=torch.uint8)
        copies.copy(target, torch.ones(8, dtype=torch.uint8))
        assert (target == 255).all()


def test_a_copy_into_freed_memory_is_an_error():
    with pytest.raises(AssertionError, match="freed while a copy into it was under way"), PoisonedClock():
        target = torch.empty(3, 4)
        on_own_stream(target, ones_kept)
        del target


def test_a_freed_source_that_the_stream_recorded_stays_until_the_copy_is_done():
    with PoisonedClock():
        target, source = torch.empty(3, 4), ones()
        stream = on_own_stream(target, source)
        source.record_stream(stream)
        del source
        wait_for(stream)
        assert torch.equal(target, ones())


def test_a_stream_that_waits_for_another_one_reads_what_that_one_copied():
    with PoisonedClock():
        buffer, result = torch.empty(3, 4), torch.empty(3, 4)
        filling = on_own_stream(buffer, ones_kept)
        reading = torch.cuda.Stream()
        reading.wait_stream(filling)
        with torch.cuda.stream(reading):
            result.copy_(buffer, non_blocking=True)
        wait_for(reading)
        assert torch.equal(result, ones_kept)


def test_on_a_stream_of_its_own_nothing_is_computed():
    with PoisonedClock(), pytest.raises(NotImplementedError, match="the clock knows copies alone"):
        with torch.cuda.stream(torch.cuda.Stream()):
            ones_kept + 1
