"""Writes down every allocation, every release and the work of every operator while a step runs on fake tensors.

It knows no model and no transformers: benchmarks.published counts steps of other versions with it.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.kernels import REFERENCES, tiles
from common.machine.collectives import local_tensor
from common.machine.host_memory import page_locked_bytes
from common.plan.operators import (
    COPY,
    DECOMPOSITIONS,
    EMPTY_ON_HOST,
    MORE_TRAFFIC,
    OPERATORS_WITHOUT_TRAFFIC,
    SCRATCH_BYTES,
    flops_of,
)
from common.plan.speed import Work
from common.plan.step import GATHERED, GRADIENTS, SAVED, WORKING, Event, Segment

# torch's CUDA caching allocator rounds every block up to a multiple of this (c10/cuda/CUDACachingAllocator.cpp).
ALLOCATOR_BLOCK_BYTES = 512

_resize, _split = torch.UntypedStorage.resize_, tiles.split


def round_up(size: int) -> int:
    """Bytes that the allocator takes for a tensor of `size` bytes."""
    return -(-size // ALLOCATOR_BLOCK_BYTES) * ALLOCATOR_BLOCK_BYTES


class Ledger(TorchDispatchMode):
    """Sees every operator of the block, and files what it allocates and does under the current segment.

    A storage is known by the address of its C++ object (`_cdata`); a weakref finalizer tells when it is released.
    """

    def __init__(self, resident: Iterable[Tensor], *, references: bool = False) -> None:
        """resident: tensors that are there before the step; they are not counted again.

        references: the operators of common.kernels run as their references, whose steps are counted one by one.
        """
        super().__init__()
        self.decompositions = DECOMPOSITIONS | REFERENCES if references else DECOMPOSITIONS
        self.allocated: dict[int, int] = {}  # storage -> its index in `allocations`
        self.allocations: list[tuple[int, int]] = []  # index of the segment, bytes
        self.events: list[tuple[int, int, int]] = []  # index of the segment, index of the allocation, +1 or -1
        self.kinds: dict[int, str] = {}  # index of the allocation -> its kind, where it is known already
        self.resident: set[int] = set()  # storages
        self.on_host: dict[int, int] = {}  # storage in host memory -> bytes
        # One entry a segment.
        self.names: list[str] = []
        self.repeats = 1  # how often each operator counts
        self.work: list[Work] = []
        self.host_bytes: list[int] = []
        for tensor in resident:
            storage = tensor.untyped_storage()
            self.resident.add(storage._cdata)
            weakref.finalize(storage, self.resident.discard, storage._cdata)
        self.begin_segment("embedding")

    def begin_segment(self, name: str) -> None:
        self.names.append(name)
        self.work.append(Work())
        self.host_bytes.append(0)

    def set_kind(self, tensor: Tensor, kind: str) -> None:
        """Says what the tensor is for. Does nothing for a tensor that was not allocated in this step."""
        allocation = self.allocated.get(local_tensor(tensor).untyped_storage()._cdata)
        if allocation is not None:
            self.kinds[allocation] = kind

    def resize(self, storage: torch.UntypedStorage, size: int) -> Any:
        """Replaces `UntypedStorage.resize_`, with which FSDP2 frees a gathered layer and allocates it again."""
        if (allocation := self.allocated.get(storage._cdata)) is not None:
            self.kinds[allocation] = GATHERED
        self._release(storage._cdata)
        resized = _resize(storage, size)
        if size:
            self.kinds[self._allocate(storage)] = GATHERED
        return resized

    def split(self, tokens: int, size: int) -> Iterator[slice]:
        """Replaces `tiles.split`: of many tiles it yields the first two and the last, and counts all.

        The second one takes what each does that has one before it and one after it, and its work counts as theirs.
        """
        slices, outer = list(_split(tokens, size)), self.repeats
        for index, part in enumerate(slices):
            if index in (0, 1, len(slices) - 1):
                self.repeats = outer * (len(slices) - 2 if 0 < index < len(slices) - 1 else 1)
                yield part
        self.repeats = outer

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].device  # half of all calls; the tensor answers without another dispatch
        kwargs = kwargs or {}
        if operator in self.decompositions:
            with self:
                return self.decompositions[operator](*args, **kwargs)
        outputs = operator(*args, **kwargs)
        if operator.namespace == "prim":  # it asks something about a tensor
            return outputs
        produced = [outputs] if isinstance(outputs, Tensor) else _tensors_in(outputs)
        if operator is EMPTY_ON_HOST:
            self._keep_on_host(produced[0])
            return outputs
        if operator is COPY and self._is_on_host(args[0]) != self._is_on_host(args[1]):
            self.work[-1].link_bytes += args[0].nbytes
            self.work[-1].launches += 1
            return outputs  # it moves beside the computation
        for tensor in produced:
            self._allocate_if_new(tensor)
        if operator.namespace == "c10d":
            self._communicate(*args[:2])
            return outputs
        if operator in SCRATCH_BYTES:
            self._allocate_scratch(round_up(SCRATCH_BYTES[operator](*args, **kwargs)))
        if operator not in OPERATORS_WITHOUT_TRAFFIC and not operator.is_view:
            traffic = sum(tensor.nbytes for tensor in _tensors_in((args, kwargs)) + produced)
            if operator in MORE_TRAFFIC:
                traffic += MORE_TRAFFIC[operator](*args, **kwargs)
            flops = flops_of(operator, args, kwargs, outputs)
            self.work[-1].operators.append((flops * self.repeats, traffic * self.repeats))
            self.work[-1].launches += self.repeats
        return outputs

    def _allocate_if_new(self, tensor: Tensor) -> None:
        storage = local_tensor(tensor).untyped_storage()
        key = storage._cdata
        if key in self.allocated or key in self.resident or key in self.on_host:
            return
        self._allocate(storage)
        weakref.finalize(storage, self._release, key)

    def _allocate(self, storage: torch.UntypedStorage) -> int:
        """Writes down the allocation; returns its index."""
        segment, allocation = len(self.names) - 1, len(self.allocations)
        self.allocations.append((segment, round_up(storage.nbytes())))
        self.allocated[storage._cdata] = allocation
        self.events.append((segment, allocation, 1))
        return allocation

    def _release(self, key: int) -> None:
        allocation = self.allocated.pop(key, None)
        if allocation is not None:
            self.events.append((len(self.names) - 1, allocation, -1))

    def _allocate_scratch(self, size: int) -> None:
        """Writes down memory that an operator allocates and releases inside itself."""
        segment, allocation = len(self.names) - 1, len(self.allocations)
        self.allocations.append((segment, size))
        self.events += [(segment, allocation, 1), (segment, allocation, -1)]

    def _is_on_host(self, tensor: Tensor) -> bool:
        return local_tensor(tensor).untyped_storage()._cdata in self.on_host

    def _keep_on_host(self, tensor: Tensor) -> None:
        key, size = tensor.untyped_storage()._cdata, page_locked_bytes(tensor.untyped_storage().nbytes())
        self.on_host[key] = size
        self.host_bytes[-1] += size
        weakref.finalize(tensor.untyped_storage(), self._leave_host, key)

    def _leave_host(self, key: int) -> None:
        self.host_bytes[-1] -= self.on_host.pop(key)

    def _communicate(self, output: Any, inputs: Any) -> None:
        """Writes down the traffic of an all-gather of a layer, or of a reduce-scatter of its gradients."""
        received, sent = sum(t.nbytes for t in _tensors_in(output)), sum(t.nbytes for t in _tensors_in(inputs))
        self.work[-1].link_bytes += abs(received - sent)
        for tensor in _tensors_in(output):
            self.set_kind(tensor, GATHERED if received > sent else GRADIENTS)

    def segments(self) -> tuple[Segment, ...]:
        """All that was written down. What a forward pass allocates and a later segment releases was saved."""
        released_in = {allocation: segment for segment, allocation, sign in self.events if sign < 0}
        for allocation, (segment, _) in enumerate(self.allocations):
            outlives = released_in.get(allocation) != segment
            forward = self.names[segment].startswith(("forward", "embedding", "head"))
            self.kinds.setdefault(allocation, SAVED if outlives and forward else WORKING)
        events: list[list[Event]] = [[] for _ in self.names]
        for segment, allocation, sign in self.events:
            allocated_in, size = self.allocations[allocation]
            events[segment].append(Event(self.kinds[allocation], sign * size, self.names[allocated_in]))
        columns = zip(self.names, events, self.work, self.host_bytes, strict=True)
        return tuple(Segment(name, tuple(events), work, host) for name, events, work, host in columns)


def _tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
