"""Activation offload: the inputs of recomputing layers wait in host memory between forward and backward.

They are copied on a CUDA stream of their own, beside the computation. The two copies are operators of torch.library
with fake versions, so a plan sees what leaves the GPU and what returns.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from common.machine.out_of_memory import allocating_on_host


@custom_op("common::to_host", mutates_args=())
def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where there is a GPU. Still under way on the copy stream when this returns."""
    with allocating_on_host():
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return _copy(tensor, host)


@custom_op("common::to_device", mutates_args=())
def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. It is still under way when this returns: call `wait_for_copies` before reading it."""
    return _copy(host, torch.empty(host.shape, dtype=host.dtype, device=device))


@to_host.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@to_device.register_fake
def _(host: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(host, device=device)


_streams: dict[torch.device, torch.cuda.Stream] = {}  # one for each GPU, as long as the process lives


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _copy(source: Tensor, target: Tensor) -> Tensor:
    gpu = next((tensor.device for tensor in (source, target) if tensor.is_cuda), None)
    if gpu is None:
        return target.copy_(source)
    stream = _copy_stream(gpu)
    # The copy begins when the source is computed, and when earlier work on the target's memory is done.
    stream.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(stream):
        return target.copy_(source, non_blocking=True)


def wait_for_copies(device: torch.device) -> None:
    """Makes what the GPU computes from here on wait for every copy that is under way; the host does not wait."""
    if device.type == "cuda" and device in _streams:
        torch.cuda.current_stream(device).wait_stream(_streams[device])


class OffloadedInputs:
    """The layers' inputs in host memory, with the two hooks of torch.autograd.graph.saved_tensors_hooks.

    A layer's input is copied to the host while the layer computes. In backward it is copied back while the layer
    after it recomputes.
    """

    def __init__(self) -> None:
        self.hosts: dict[int, Tensor] = {}
        self.leaving: Tensor | None = None  # kept alive until its copy is done
        self.returning: dict[int, Tensor] = {}
        self.device = torch.device("cpu")

    def pack(self, layer: int, tensor: Tensor) -> Tensor | int:
        """Starts the copy of a layer's input; returns what autograd keeps instead. An empty tensor stays as it is."""
        if not tensor.numel():
            return tensor
        with torch.no_grad():
            wait_for_copies(self.device)  # that of the layer before, which was done long ago
            self.returning.clear()
            self.device, self.leaving = tensor.device, tensor.detach()
            self.hosts[layer] = to_host(self.leaving)
        return layer

    def unpack(self, packed: Tensor | int) -> Tensor:
        """The layer's input on its device again; starts the copy of the input of the layer before."""
        if isinstance(packed, Tensor):
            return packed
        self.leaving = None
        tensor = self._start_return(packed)
        wait_for_copies(self.device)
        del self.returning[packed], self.hosts[packed]
        if packed - 1 in self.hosts:
            self._start_return(packed - 1)
        return tensor

    def _start_return(self, layer: int) -> Tensor:
        if layer not in self.returning:
            self.returning[layer] = to_device(self.hosts[layer], self.device)
        return self.returning[layer]
