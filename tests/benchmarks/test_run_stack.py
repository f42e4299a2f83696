"""A stack in a process of its own: what it is started with, and how its end is put into words."""

import json

import pytest

from benchmarks import stacks
from benchmarks.run_stack import describe_failure, run_stack, write_rows
from benchmarks.stacks import Job
from tests.conftest import TINY

# The last lines of processes that ran out of memory, as torch, CUDA, cuBLAS, the C++ runtime and Python write them.
OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.2 GiB",
    "torch.AcceleratorError: CUDA error: out of memory",
    "RuntimeError: CUDA driver error: out of memory",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:133] . DefaultCPUAllocator: can't allocate memory: you tried to",
    "MemoryError",
    "  what():  std::bad_alloc",
    "common.recipe.UserError: out of GPU memory at step 1, even every layer recomputes",
)


@pytest.mark.parametrize("line", OUT_OF_MEMORY)
def test_every_kind_of_out_of_memory_is_said_as_one(line):
    assert describe_failure(f"Traceback (most recent call last):\n  File x\n{line}") == "out of memory"


def test_a_process_that_failed_says_why_in_a_few_words():
    assert describe_failure("Traceback\nValueError: no such thing\nwarning: more") == "ValueError: no such thing"
    assert describe_failure("") == "no message"
    assert describe_failure("loading", -9) == "killed by the system: out of host memory, most likely"


def job(tmp_path, tokens: int = 32) -> Job:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, tokens, 2, TINY)
    assert [len(json.loads(line)) for line in rows.read_text().splitlines()] == [tokens, tokens]
    return Job(str(TINY), str(rows), tokens, 1, 1, 1, None, 0.0)


def imitate_unsloth(folder, code: str) -> str:
    (folder / "unsloth.py").write_text("import os, sys\n" + code)
    return str(folder)


def test_unsloth_without_its_compiler_is_told_so_before_it_is_imported(tmp_path):
    peers = imitate_unsloth(tmp_path, "raise ValueError(f\"{os.environ.get('UNSLOTH_COMPILE_DISABLE')}\")")
    assert run_stack("unsloth, not compiled", job(tmp_path), peers)["failed"] == "ValueError: 1"
    assert run_stack("unsloth", job(tmp_path), peers)["failed"] == "ValueError: None"


@pytest.mark.slow  # it imports torch, transformers and trl
def test_unsloth_is_imported_before_torch_and_given_the_stacks_options(tmp_path):
    code = """
assert "torch" not in sys.modules
class FastLanguageModel:
    def from_pretrained(model, **options):
        raise ValueError(" ".join(sorted(options)))
"""
    failed = run_stack("unsloth, tiled MLP", job(tmp_path), imitate_unsloth(tmp_path, code))["failed"]
    assert failed == "ValueError: load_in_4bit max_seq_length unsloth_tiled_mlp"


def test_a_stack_that_takes_too_long_is_stopped(tmp_path):
    peers = imitate_unsloth(tmp_path, "import time; time.sleep(60)")
    assert run_stack("unsloth", job(tmp_path), peers, seconds=0.5)["failed"] == "took longer than 0 s"


def test_unsloth_is_imported_by_no_other_stack():
    assert {name for name in stacks.STACKS if "unsloth" in name} == {
        name for name in stacks.STACKS if name.startswith("unsloth")
    }
    assert set(stacks.ENVIRONMENT) <= set(stacks.STACKS)
    assert set(stacks.NEEDS_GPU) <= set(stacks.STACKS)
