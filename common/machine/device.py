"""The GPU or CPU of this machine: the dtype to compute in, its memory, and why a GPU cannot be used."""

import gc
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from common.control_group import memory_left
from common.machine.gpus import NVIDIA_SMI_SECONDS, missing_gpu, shown_gpus
from common.machine.processes import local_rank, world_size
from common.recipe import UserError

GIB = 1 << 30
BF16_CAPABILITY = (8, 0)  # from the RTX 30 series and A100 on; torch.cuda.is_bf16_supported looks at the same
DRIVER_SERIES = 580  # the first that runs CUDA 13, of whose 13.0 torch is built (CUDA 13.0 release notes)


@dataclass(frozen=True)
class Machine:
    """The device that this process computes on."""

    device: torch.device
    dtype: torch.dtype  # of the computation, and of every weight that is not 4-bit
    reason: str  # why this dtype
    name: str  # as it is printed

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def free_bytes(self) -> int:
        """Free memory of the GPU in bytes; 0 on a CPU, whose memory is not planned."""
        return torch.cuda.mem_get_info(self.device)[0] if self.is_gpu else 0

    def room_bytes(self) -> int | None:
        """What tensors can still take: of the GPU what is free or lies unused in torch's allocator, of a CPU the
        available RAM; None where the system does not say."""
        if not self.is_gpu:
            return available_ram()
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return self.free_bytes() + unused

    def reset_peak(self) -> None:
        """On a GPU peak_bytes and allocated_bytes are those from here on; a CPU's stay those of the process."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()  # what lies unused in the allocator is reserved as well
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Peak memory so far in bytes: reserved by the allocator on a GPU, resident in RAM on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.is_gpu else peak_ram()

    def allocated_bytes(self) -> int | None:
        """Peak of the tensors' memory on the GPU so far in bytes; None on a CPU, where torch does not count it."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_gpu else None

    def full_times(self) -> tuple[int, int]:
        """How often so far torch's allocator found the GPU full and tried again, and how often it gave up.

        To try again it waits for the GPU and gives back what it had cached. Where it gives up, torch raises
        OutOfMemoryError. Zeros on a CPU.
        """
        if not self.is_gpu:
            return 0, 0
        counts = torch.cuda.memory_stats(self.device)
        return counts.get("num_alloc_retries", 0), counts.get("num_ooms", 0)

    def __str__(self) -> str:
        return f"{self.name}, computing in {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def peak_ram() -> int:
    """Peak resident memory of this process so far in bytes; 0 where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)


def available_ram() -> int | None:
    """Host memory that is available now, in bytes, in a container with a limit what is left of that.

    None where the system does not say (not Linux).
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    return int(max(0, min(free, memory_left())))


@cache
def this_machine() -> Machine:
    """Returns the device of this process: on a GPU bf16 where it has it and else fp16, on a CPU fp32.

    A GPU that torch has no code for is none: unusable_gpu says so.
    """
    if torch.cuda.is_available() and _without_code() is None:
        return _gpu(local_rank())
    threads = torch.get_num_threads()
    cores = f"CPU, {threads} thread" + "s" * (threads > 1)
    # Some CPUs are faster in bf16 (AMX). But models on a CPU are small, and with fp32 no result depends on the CPU.
    return Machine(torch.device("cpu"), torch.float32, "as on every CPU", cores)


def first_gpus(count: int) -> list[Machine]:
    """Returns the GPUs that a run on `count` of them would use here, or as many as this process sees."""
    return [_gpu(number) for number in range(min(count, torch.cuda.device_count()))]


def _gpu(number: int) -> Machine:
    device = torch.device("cuda", number)
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    name = f"{torch.cuda.get_device_name(device)}, {total:.1f} GiB"
    return Machine(device, *compute_dtype(torch.cuda.get_device_capability(device)), name)


def compute_dtype(capability: tuple[int, int]) -> tuple[torch.dtype, str]:
    """Returns the dtype that a GPU of this compute capability computes in, and why."""
    if capability >= BF16_CAPABILITY:
        return torch.bfloat16, "the GPU has bf16"
    return torch.float16, "the GPU has no bf16"


def _without_code() -> str | None:
    """Returns in one line that torch was not built for this process's GPU; None when it was."""
    device = torch.device("cuda", local_rank())
    capability, architectures = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not architectures or has_code_for(capability, architectures):
        return None
    built = sorted({_version_of(architecture) for architecture in architectures})
    builds = ", ".join(f"{major}.{minor}" for major, minor in built)
    lowest = f"{built[0][0]}.{built[0][1]}"
    needed = f"a card of capability {lowest} or newer" if capability < built[0] else "a newer torch"
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and torch "
        f"{torch.__version__} has code for {builds}: what is needed is {needed}"
    )


def has_code_for(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Returns whether a GPU can run what was built for these architectures (torch.cuda.get_arch_list).

    Machine code, sm_XY, runs on capabilities X.Y and newer ones of the same X; sm_XYa on X.Y alone. PTX, compute_XY, is
    compiled for any newer GPU (CUDA programming guide, "Compute capabilities" and "Architecture-specific features").
    """
    for architecture in architectures:
        built = _version_of(architecture)
        is_ptx, is_specific = architecture.startswith("compute"), architecture.endswith("a")
        if capability == built:
            return True
        if not is_specific and built < capability and (is_ptx or built[0] == capability[0]):
            return True
    return False


def _version_of(architecture: str) -> tuple[int, int]:
    """(9, 0) for sm_90, sm_90a and compute_90; (12, 0) for sm_120f."""
    digits = architecture.partition("_")[2].rstrip("af")
    return int(digits[:-1]), int(digits[-1])


def unusable_gpu() -> str | None:
    """Returns in one line why torch cannot use the machine's NVIDIA GPU.

    None when it can, when there is none, and when CUDA_VISIBLE_DEVICES hides all of them.
    """
    if torch.cuda.is_available():
        return _without_code()
    if shown_gpus() == [] or not _has_nvidia_gpu():
        return None
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is a CPU build. Install the CUDA build: "
            "rm -rf .venv && make setup (with no other package index configured)"
        )
    if missing := missing_gpu():
        return f"CUDA_VISIBLE_DEVICES is set, and {missing}"
    driver = _driver_version()
    series = driver.partition(".")[0]
    if series.isdecimal() and int(series) >= DRIVER_SERIES:
        return (
            f"this machine has an NVIDIA GPU, and its driver {driver} is new enough, but CUDA finds none "
            f"({_cuda_error()}). nvidia-smi -L lists what there is; a GPU in MIG mode needs an instance"
        )
    return (
        f"this machine has an NVIDIA GPU (driver {driver}), but torch {torch.__version__} cannot use it: CUDA "
        f"{torch.version.cuda} needs a driver of the {DRIVER_SERIES} series or newer. Update the driver, then check "
        "nvidia-smi"
    )


def warn_of_unused_gpu(work: str) -> None:
    """Prints why `work`, such as "training", is done on the CPU of a machine that has an NVIDIA GPU."""
    if reason := unusable_gpu():
        print(f"warning: {work} on the CPU: {reason}", flush=True)


def _has_nvidia_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "without an error"


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi fails"
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else "unknown"


def require_gpu_per_process() -> None:
    """Raises UserError when this process of a run on several has no GPU that it can use. A CPU may have any number."""
    if world_size() == 1 or not torch.cuda.is_available():
        return
    if local_rank() >= torch.cuda.device_count():
        raise UserError(f"GPUS is more than {local_rank()}, and this process sees {torch.cuda.device_count()} GPU(s)")
    if reason := _without_code():
        raise UserError(f"not all GPUs can be used: {reason}. CUDA_VISIBLE_DEVICES=0,1 names the ones to use")


def require_gpu(model_name: str) -> None:
    """Raises UserError, which says what to do, unless torch can use a GPU."""
    reason = unusable_gpu()
    if torch.cuda.is_available() and reason is None:
        return
    if reason is None and shown_gpus() == [] and _has_nvidia_gpu():
        reason = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides those of this machine"
    reason = reason or "this machine has none that torch can see"
    raise UserError(
        f"{model_name} needs an NVIDIA GPU: {reason}. To try everything on a CPU: make finetune MODEL=tiny. A recipe "
        "with card_gib=None runs on a CPU too, slowly"
    )
