"""A process group without peers, for counting the memory of sharded layers in one process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import distributed
from torch.distributed import DeviceMesh
from torch.distributed.device_mesh import init_device_mesh


@contextmanager
def fake_process_group(processes: int) -> Iterator[DeviceMesh]:
    """Yields a mesh of `processes` ranks, this process being rank 0, on torch's fake backend.

    Its collectives return at once and send nothing; what they would receive is not initialized.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # the backend "fake" is registered with it

    if distributed.is_initialized():
        yield DeviceMesh.from_group(_fake_group(), "cpu")
        return
    hook = sys.excepthook
    distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        distributed.destroy_process_group()
        sys.excepthook = hook  # torch has put its own around it


@cache
def _fake_group() -> Any:
    return distributed.new_group(backend="fake")
