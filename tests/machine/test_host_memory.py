"""Host memory for copies to and from a GPU: what torch takes for it, and what is done where it is refused."""

import os

import pytest
import torch

from common.machine import host_memory
from common.machine.host_memory import empty_on_host, lock_pages, page_locked, page_locked_bytes
from tests.test_process_state import environment_after_import

MIB = 1 << 20


@pytest.mark.parametrize(
    ("settings", "size", "taken"),
    [
        ("expandable_segments:True", 20 * MIB, 32 * MIB),
        ("expandable_segments:True", 32 * MIB, 32 * MIB),
        ("expandable_segments:True,pinned_max_cached_size_mb:4", 20 * MIB, 20 * MIB),
        ("pinned_max_cached_size_mb:4", 4 * MIB + 1, 4 * MIB + 1),
        ("pinned_max_cached_size_mb:4", 4 * MIB - 1, 4 * MIB),
        ("pinned_max_cached_size_mb:4", 3, 4),
        ("pinned_max_cached_size_mb:4", 1, 1),
        ("pinned_max_cached_size_mb:4", 0, 0),
        ("pinned_max_cached_size_mb:64 , pinned_max_round_threshold_mb: 16", 20 * MIB, 20 * MIB),
        ("pinned_max_cached_size_mb:64,pinned_max_round_threshold_mb:32", 20 * MIB, 32 * MIB),
    ],
)
def test_torch_takes_a_power_of_two_up_to_its_limit(settings, size, taken, monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", settings)
    assert page_locked_bytes(size) == taken


def test_the_settings_of_a_run_take_large_blocks_in_their_exact_size(monkeypatch):
    ours, _ = environment_after_import()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", ours["PYTORCH_ALLOC_CONF"])
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert page_locked_bytes(20 * MIB) == 20 * MIB
    torch._C._accelerator_setAllocatorSettings(ours["PYTORCH_ALLOC_CONF"])  # raises for a name that torch lacks


def test_the_variable_for_cuda_hides_the_general_one_as_in_torch(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "pinned_max_cached_size_mb:4")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    assert page_locked_bytes(20 * MIB) == 32 * MIB


def test_where_locking_is_refused_it_is_ordinary_memory_and_a_line_says_so_once(capsys):
    """A build of torch without CUDA refuses, as a container may."""
    if torch.cuda.is_available():
        pytest.skip("this machine locks memory")
    host_memory._report_refusal.cache_clear()
    blocks = [page_locked(1000) for _ in range(2)]
    assert [(block.dtype, block.shape, block.is_pinned()) for block in blocks] == 2 * [(torch.uint8, (1000,), False)]
    out = capsys.readouterr().out
    assert out.count("host memory cannot be page-locked (") == 1 and "ulimit -l" in out


def test_where_there_is_no_memory_for_it_it_is_an_error(monkeypatch):
    monkeypatch.setattr(host_memory, "available_ram", lambda: 999)
    if torch.cuda.is_available():
        pytest.skip("this machine locks memory")
    with pytest.raises(RuntimeError):
        page_locked(1000)


def test_what_cuda_says_of_its_own_memory_is_memory_of_the_host(monkeypatch):
    def fail(*_, **__):
        raise torch.AcceleratorError("CUDA error: out of memory")  # cudaHostAlloc's

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(MemoryError, match="pinned host memory"):
        page_locked(1 << 60)


def test_for_a_tensor_on_the_cpu_nothing_is_locked(capsys):
    host_memory._report_refusal.cache_clear()
    assert empty_on_host(8, torch.ones(2)).shape == (8,)
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
def test_page_locked_memory_takes_its_exact_size():
    if os.environ.get("PYTORCH_CUDA_ALLOC_CONF") is not None:
        pytest.skip("the user's own settings")
    torch.cuda.synchronize()
    page_locked(1)  # takes what others have dropped off the books
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    block = page_locked(20 * MIB)
    after = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    assert block.is_pinned() and after - before == page_locked_bytes(20 * MIB) == 20 * MIB
    assert block[MIB:].view(torch.bfloat16).is_pinned()  # a view into it


class Runtime:
    """CUDA's runtime, as torch hands it out: it locks pages, or refuses with a status."""

    def __init__(self, status: int) -> None:
        self.status, self.locked = status, {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.status:
            self.locked[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def cudaGetErrorString(self, status: int) -> str:
        return f"error {status}"


@pytest.fixture
def runtime(monkeypatch):
    def of_status(status: int) -> Runtime:
        made = Runtime(status)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        host_memory._report_refusal.cache_clear()
        return made

    return of_status


def test_memory_that_torch_did_not_give_out_is_locked_in_its_exact_size_until_it_is_dropped(runtime, capsys):
    locks, block = runtime(0), torch.zeros(1000, dtype=torch.uint8)
    lock_pages(block, torch.device("cpu"))
    assert locks.locked == {block.data_ptr(): 1000}
    view = block[8:16].view(torch.int64)
    del block
    assert locks.locked  # the view is in it
    del view
    assert not locks.locked and capsys.readouterr().out == ""


def test_where_locking_it_is_refused_a_line_says_so_once(runtime, capsys):
    locks, block = runtime(801), torch.zeros(1000, dtype=torch.uint8)
    for _ in range(2):
        lock_pages(block, torch.device("cpu"))
    out = capsys.readouterr().out
    assert out.count("host memory cannot be page-locked (cudaHostRegister: error 801): ") == 1 and "slower way" in out
    del block
    assert not locks.locked
