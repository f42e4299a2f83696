"""CUDA streams on a CPU, where each wait that is missing or misplaced does harm every time.

On a GPU a copy on a stream of its own happens at some moment between two limits: not before what its stream waited for,
and not after somebody waited for it. A wait too few is then read as garbage in one run of many. Here every copy takes
the worst moment:

- It happens as late as it may: when the computation, another stream or the host waits for it. Until then its target
  holds NaN. So what reads the target too early reads NaN, and what changes the source too early changes the copy.
- It counts as begun as early as it may: its stream had to wait for the computation after the last write to the source
  and after the last use of the target. Otherwise the copy might take what is not computed yet, or overwrite what is
  still read, and its target becomes NaN.
- Memory that is freed belongs to somebody else. A copy from freed memory gives NaN. A copy into it would damage
  another tensor, which no loss need show: the clock raises AssertionError, at the latest when it is left.
- The host runs ahead of the GPU. What it does to page-locked memory (empty_on_host), while a copy from or to it is
  begun that the host itself has not waited for, is such an error too: that the computation waited does not help.

NaN is bytes of 255: NaN in every float format, and a wrong number in integers (packed weights).

    with PoisonedClock():
        ...  # our own code, which makes streams and events with torch.cuda and copies with Tensor.copy_

It stands in for torch.cuda.Stream, Event, current_stream, default_stream, stream and synchronize, for
Tensor.record_stream, and for Tensor.copy_ on another stream than the default one. The default stream is the
computation: it is a step ahead of nobody, because the CPU computes at once. All else that runs is real.

One thing it cannot tell. The operators that it sees are those that torch dispatches in this thread: what a custom
operator does inside counts as done by the operator.

To test something that copies: make it run under the clock in every order that can happen (forward and backward,
evaluation in between, a step that is given up in its middle, larger and smaller batches), compare the result with one
that copies nothing, bit for bit; then take out each wait in turn and see that the comparison fails.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common.machine.host_memory  # noqa: F401  (registers torch.ops.common.empty_on_host)
from common.machine import copy_stream

EMPTY_ON_HOST = torch.ops.common.empty_on_host.default


class Place:
    """Where a tensor lies, without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = weakref.ref(tensor.untyped_storage())
        self.layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        self.dtype = tensor.dtype

    def tensor(self) -> Tensor | None:
        """The tensor; None where its memory was freed."""
        storage = self.storage()
        return None if storage is None else torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Stream:
    """torch.cuda.Stream. Its work is a list of copies and of waits for other streams, in order."""

    def __init__(self, clock: "PoisonedClock", device: torch.device, *, is_default: bool = False) -> None:
        self.clock, self.device, self.is_default = clock, device, is_default
        self.seen = 0  # the moment of the computation that it has waited for
        self.work: list[Callable[[], None]] = []
        self.done = 0  # of the work
        self.host_waited = 0  # of the work, what the host has waited for

    def begin(self, work: Callable[[], None]) -> None:
        self.work.append(work)

    def run(self, until: int) -> None:
        while self.done < until:
            work, self.work[self.done] = self.work[self.done], _nothing  # lets go of what it held
            self.done += 1
            work()

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self.clock)
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.run(len(self.work))
        self.host_waited = len(self.work)

    def query(self) -> bool:
        return self.done == len(self.work)


class Event:
    """torch.cuda.Event: a point in the work of the stream that recorded it."""

    def __init__(self, clock: "PoisonedClock") -> None:
        self.clock = clock
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.clock.current
        self.until = len(self.stream.work)
        self.moment = self.clock.now if self.stream.is_default else self.stream.seen

    def wait(self, stream: Stream | None = None) -> None:
        """What `stream` is given from here on comes after the event."""
        waiting, recorded = stream or self.clock.current, self.stream
        if recorded is None:  # an event that was not recorded holds nobody up
            return
        until = self.until
        waiting.seen = max(waiting.seen, self.moment)
        if waiting.is_default:
            recorded.run(until)
        elif recorded is not waiting:
            waiting.begin(lambda: recorded.run(until))

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run(self.until)
            self.stream.host_waited = max(self.stream.host_waited, self.until)

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.until


class PoisonedClock(TorchDispatchMode):
    """The clock, as a context manager. copies: how many were begun."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0  # operators of the computation so far
        self.written: dict[int, int] = {}  # storage -> the moment of its last write
        self.used: dict[int, int] = {}  # storage -> the moment of its last read or write
        self.on_host: dict[int, list[tuple[Stream, int]]] = {}  # storage in host memory -> the copies from and to it
        self.default = self.current = Stream(self, torch.device("cpu"), is_default=True)
        self.own = False  # the clock itself computes
        self.copies = 0
        self.harm: list[str] = []
        self.copy_ = Tensor.copy_

    # What the computation does

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.own:
            return operator(*args, **kwargs)
        if not self.current.is_default and not operator.is_view:
            raise NotImplementedError(f"{operator} on a stream of its own: the clock knows copies alone")
        outputs = operator(*args, **kwargs)
        if operator.is_view:
            return outputs
        self.now += 1
        names = operator._schema.arguments
        given = {**dict(zip((argument.name for argument in names), args, strict=False)), **kwargs}
        written = {argument.name for argument in names if argument.alias_info and argument.alias_info.is_write}
        for name, value in given.items():
            for tensor in _tensors_in(value):
                self.touch(tensor, write=name in written)
        for tensor in _tensors_in(outputs):
            self.touch(tensor, write=True)
            if operator is EMPTY_ON_HOST:
                self.on_host[tensor.untyped_storage()._cdata] = []
        return outputs

    def touch(self, tensor: Tensor, *, write: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.used:
            weakref.finalize(storage, self.forget, key).atexit = False
        if any(stream.host_waited < number for stream, number in self.on_host.get(key, ())):
            self.harm.append("the host reads or changes host memory while a copy from or to it may be under way")
        self.used[key] = self.now
        if write:
            self.written[key] = self.now

    def forget(self, key: int) -> None:
        self.used.pop(key, None)
        self.written.pop(key, None)
        self.on_host.pop(key, None)

    # Copies

    def copy(self, target: Tensor, source: Any, non_blocking: bool = False) -> Tensor:
        """Stands in for Tensor.copy_."""
        stream = self.current
        if stream.is_default or self.own:
            return self.copy_(target, source, non_blocking)
        assert non_blocking, "the host would wait for the copy, and for all that its stream waits for"
        self.copies += 1
        is_ready = max(self._moment(source, self.written), self._moment(target, self.used)) <= stream.seen
        with self._own_work():
            _poison(target)
        places = Place(target), Place(source)
        stream.begin(lambda: self.finish(*places, is_ready))
        for tensor in (target, source):
            if (copies := self.on_host.get(tensor.untyped_storage()._cdata)) is not None:
                copies.append((stream, len(stream.work)))
        weakref.finalize(target.untyped_storage(), self.target_freed, stream, len(stream.work)).atexit = False
        return target

    def finish(self, target_place: Place, source_place: Place, is_ready: bool) -> None:
        with self._own_work():
            target, source = target_place.tensor(), source_place.tensor()
        if target is None:
            return  # target_freed has noticed
        with self._own_work():
            if source is None or not is_ready:
                _poison(target)
            else:
                self.copy_(target, source)

    def target_freed(self, stream: Stream, number: int) -> None:
        if stream.done < number:
            self.harm.append("memory was freed while a copy into it was under way, which will damage another tensor")

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """Stands in for Tensor.record_stream: the memory is freed when the work that the stream has now is done."""
        storage = tensor.untyped_storage()
        stream.begin(lambda: _nothing(storage))

    def _moment(self, tensor: Tensor, moments: dict[int, int]) -> int:
        return moments.get(tensor.untyped_storage()._cdata, 0)

    @contextlib.contextmanager
    def _own_work(self) -> Iterator[None]:
        before, self.own = self.own, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.own = before

    # What stands in for torch.cuda

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, device: Any = None) -> None:
        for stream in self.streams:
            stream.synchronize()

    def make_stream(self, device: Any = None, priority: int = 0) -> Stream:
        self.streams.append(Stream(self, torch.device(device or "cpu")))
        return self.streams[-1]

    def __enter__(self) -> "PoisonedClock":
        self.streams: list[Stream] = []
        self.patches = contextlib.ExitStack()
        stand_ins: dict[str, Any] = {
            "Stream": self.make_stream,
            "Event": lambda *_, **__: Event(self),
            "current_stream": lambda device=None: self.current,
            "default_stream": lambda device=None: self.default,
            "stream": self.stream,
            "synchronize": self.synchronize,
        }
        for name, stand_in in stand_ins.items():
            self.patches.enter_context(patch.object(torch.cuda, name, stand_in))
        clock = self
        for name, method in (("copy_", clock.copy), ("record_stream", clock.record_stream)):
            stand_in = lambda tensor, *args, _do=method, **kwargs: _do(tensor, *args, **kwargs)  # noqa: E731
            self.patches.enter_context(patch.object(Tensor, name, stand_in))
        self.patches.enter_context(patch.object(copy_stream, "DEVICES_WITH_STREAMS", frozenset({"cuda", "cpu"})))
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        self.patches.close()
        if kind is None:
            assert not self.harm, self.harm[0]


def _nothing(*_: Any) -> None:
    pass


def _tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _poison(tensor: Tensor) -> None:
    if tensor.is_contiguous():
        tensor.view(-1).view(torch.uint8).fill_(255)
    else:
        tensor.fill_(float("nan"))
