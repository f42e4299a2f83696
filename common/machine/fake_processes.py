"""A group of processes that do not exist, so that one process can count what sharded layers take of a card."""

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
    """Yields a mesh of so many processes on torch's "fake" backend, this process among them.

    Collectives return at once and send nothing: what a process would receive is uninitialised memory.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # also registers the backend "fake"

    if distributed.is_initialized():
        yield DeviceMesh.from_group(_fake_group(), "cpu")
        return
    excepthook = sys.excepthook
    distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        distributed.destroy_process_group()
        sys.excepthook = excepthook  # init_process_group has replaced it


@cache
def _fake_group() -> Any:
    """A fake group of the real processes of the run, where they are connected."""
    return distributed.new_group(backend="fake")
