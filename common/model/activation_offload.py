"""Activation offload: the inputs of recomputing layers wait in host memory between forward and backward.

They are copied on a CUDA stream of their own, beside the computation. Each layer has one block of page-locked host
memory, which it keeps from micro-batch to micro-batch. The largest micro-batch, which the rehearsal computes first,
decides its size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.machine.copy_stream import CopyStream
from common.machine.host_memory import empty_on_host


class Packed(NamedTuple):
    """What autograd keeps instead of a layer's input."""

    layer: int
    host: Tensor  # its copy in host memory


class OffloadedInputs:
    """The layers' inputs in host memory, with the two hooks of torch.autograd.graph.saved_tensors_hooks.

    A layer's input is copied to the host while the layer computes. In backward it is copied back while the layer
    after it computes. Call `finish` before the object is dropped or left in the middle of a micro-batch.
    """

    def __init__(self, *, early: bool = True) -> None:
        """early: an input is copied back while the layer after it recomputes; else when `start_return` is called."""
        self.early = early
        self.blocks: dict[int, Tensor] = {}  # host memory of each layer: uint8, as large as its largest input so far
        self.hosts: dict[int, Tensor] = {}  # the inputs that wait there
        self.leaving: Tensor | None = None  # kept alive until its copy is done
        self.returning: dict[int, Tensor] = {}
        self.copies = CopyStream(torch.device("cpu"))  # of the device of the first input

    def pack(self, layer: int, tensor: Tensor) -> Tensor | Packed:
        """Starts the copy of a layer's input; returns what autograd keeps instead. An empty tensor stays as it is."""
        if not tensor.numel():
            return tensor
        with torch.no_grad():
            source = tensor.detach().contiguous()
            if source.device != self.copies.device:
                self.copies = CopyStream(source.device)
            self.copies.wait()  # for that of the layer before, which was done long ago: its source goes now
            self.returning.clear()  # where a backward pass has not come to its end
            self.leaving = source
            self.hosts[layer] = host = self._host_tensor(layer, source)
            self.copies.copy(host, source)
        return Packed(layer, host)

    def unpack(self, packed: Tensor | Packed) -> Tensor:
        """The layer's input on its device again; starts the copy of the input of the layer before.

        Raises RuntimeError when another micro-batch has taken the place of the input, or it was returned already.
        """
        if isinstance(packed, Tensor):
            return packed
        layer = packed.layer
        if self.hosts.get(layer) is not packed.host:
            raise RuntimeError(
                f"the input of layer {layer} is not in host memory any more: one backward pass a forward"
            )
        if self.leaving is not None:  # the last one of the forward pass
            self.copies.wait()
            self.leaving = None
        self.start_return(layer)
        self.copies.wait()
        del self.hosts[layer]
        if self.early:
            self.start_return(layer - 1)
        return self.returning.pop(layer)

    def finish(self) -> None:
        """Returns when no copy is under way, and lets go of all memory.

        Otherwise a copy could still write to memory of the device that somebody else has by then.
        """
        self.copies.synchronize()
        self.leaving = None
        for tensors in (self.returning, self.hosts, self.blocks):
            tensors.clear()

    def _host_tensor(self, layer: int, like: Tensor) -> Tensor:
        """Host memory for a tensor like this one, in the layer's block, which grows where it is too small."""
        block = self.blocks.get(layer)
        if block is None or block.nbytes < like.nbytes:
            self.hosts.pop(layer, None)
            self.blocks.pop(layer, None)  # before the larger one is taken
            block = self.blocks[layer] = empty_on_host(like.nbytes, like)
        return block[: like.nbytes].view(like.dtype).view(like.shape)

    def start_return(self, layer: int) -> None:
        """Starts the copy of a layer's input to its device, where it waits in host memory and no copy was started."""
        if layer in self.hosts and layer not in self.returning:
            host = self.hosts[layer]
            self.returning[layer] = torch.empty(host.shape, dtype=host.dtype, device=self.copies.device)
            self.copies.copy(self.returning[layer], host)
