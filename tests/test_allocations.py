import gc

import torch

from tests.allocations import peak_in, watched_allocations


def test_garbage_of_earlier_code_does_not_count():
    def leave_garbage() -> int:
        with watched_allocations() as profiler:
            cycle = [torch.zeros(1 << 20)]
            cycle.append(cycle)  # type: ignore[arg-type]
        return peak_in(profiler)

    gc.disable()
    try:
        assert leave_garbage() == leave_garbage() == 4 << 20
        assert not gc.isenabled()
    finally:
        gc.enable()
    leave_garbage()
    assert gc.isenabled()
