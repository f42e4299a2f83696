"""The GPU or CPU of this machine: the dtype to compute in, its memory, and why a GPU cannot be used."""

import gc
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from common.machine.processes import local_rank
from common.recipe import UserError

GIB = 1 << 30


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

    def __str__(self) -> str:
        return f"{self.name}, computing in {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def peak_ram() -> int:
    """Peak resident memory of this process so far in bytes; 0 where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)


def available_ram() -> int | None:
    """Host memory that is available now, in bytes; None where the system does not say (not Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)


@cache
def this_machine() -> Machine:
    """Returns the device of this process: on a GPU bf16 where it has it and else fp16, on a CPU fp32."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        name = f"{torch.cuda.get_device_name(device)}, {total:.1f} GiB"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Machine(device, torch.bfloat16, "the GPU has bf16", name)
        return Machine(device, torch.float16, "the GPU has no bf16", name)
    cores = f"CPU, {torch.get_num_threads()} threads"
    # Some CPUs are faster in bf16 (AMX). But models on a CPU are small, and with fp32 no result depends on the CPU.
    return Machine(torch.device("cpu"), torch.float32, "as on every CPU", cores)


def unusable_gpu() -> str | None:
    """Returns in one line why torch cannot use the machine's NVIDIA GPU; None when it can, or when there is none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden or not (Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")):
        return None
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is a CPU build. Install the CUDA build: "
            "rm -rf .venv && make setup (with no other package index configured)"
        )
    driver = _driver_version()
    return (
        f"this machine has an NVIDIA GPU (driver {driver}), but torch {torch.__version__} cannot use it: CUDA "
        f"{torch.version.cuda} needs a driver of the 580 series or newer. Update the driver, then check nvidia-smi"
    )


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi fails"
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else "unknown"


def require_gpu_per_process() -> None:
    """Raises UserError when this machine has fewer GPUs than the run has processes here. A CPU may have any number."""
    if torch.cuda.is_available() and local_rank() >= torch.cuda.device_count():
        raise UserError(f"GPUS is more than {local_rank()}, and this machine has {torch.cuda.device_count()}")


def require_gpu(model_name: str) -> None:
    """Raises UserError, which says what to do, unless torch can use a GPU."""
    if torch.cuda.is_available():
        return
    reason = unusable_gpu() or "this machine has none that torch can see"
    raise UserError(
        f"{model_name} needs an NVIDIA GPU: {reason}. To try everything on a CPU: make finetune MODEL=tiny. A recipe "
        "with card_gib=None runs on a CPU too, slowly"
    )
