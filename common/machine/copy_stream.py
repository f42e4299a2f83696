"""Copies between a GPU and the host on a CUDA stream of their own, beside the computation.

A GPU does what is put on one stream in order, and different streams at the same time. So two things must be said: a
copy waits for the computation that it depends on (`CopyStream.copy` says it), and the computation waits for the copy
before it reads or reuses what is copied (`CopyStream.wait`, where the caller knows that this is so). A wait too few
reads garbage, sometimes, and only on a GPU. tests/poisoned_clock.py makes each of them fail on a CPU.
"""

import torch
from torch import Tensor

DEVICES_WITH_STREAMS = frozenset({"cuda"})  # elsewhere a copy is done when it is begun


class CopyStream:
    """A stream for copies from and to one device. Copies happen in the order in which they are begun."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type in DEVICES_WITH_STREAMS else None

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begins a copy, which starts when all that the computation was given so far is done.

        Until then the source is not computed, and the target's memory may still serve what had it before. Source and
        target: one on the device, one in page-locked host memory (common.machine.host_memory), both contiguous, of one
        shape and dtype. Both must be kept, and the source unchanged, until `wait` was called.
        """
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Makes what the computation is given from here on wait for the copies begun so far. The host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def synchronize(self) -> None:
        """Returns when the copies begun so far are done."""
        if self.stream is not None:
            self.stream.synchronize()
