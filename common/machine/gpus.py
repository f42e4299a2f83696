"""Which GPU a process computes on: GPU= or the first of those that the user shows it (CUDA_VISIBLE_DEVICES).

The processes of a run on several GPUs see all that the user shows them, and take one each (processes.local_rank).
Standard library only at import: CUDA reads the variable once, when it is first asked, and importing bitsandbytes asks.
"""

import os
import subprocess
import sys

from common.process_state import show_one_gpu
from common.recipe import UserError, require

NVIDIA_SMI_SECONDS = 20  # a driver that has just been loaded takes a few


def use_one_gpu(wanted: str | None = None) -> None:
    """Hides all GPUs but one from this process; transformers' trainer would use all that it sees.

    Not to be called in a process that starts those of a run on several GPUs. wanted: a number from 0 on, of nvidia-smi,
    or within CUDA_VISIBLE_DEVICES where that is set; None takes the first. Raises UserError when there is no such GPU.
    """
    shown, variable = shown_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        if shown is None:
            show_one_gpu("0")
        elif len(shown) > 1:
            show_one_gpu(shown[0])
            print(
                f"CUDA_VISIBLE_DEVICES={variable} names {len(shown)} GPUs, and this process computes on the first, "
                f"{shown[0]}. GPU=1 takes the next one, and a run with GPUS={len(shown)} all of them",
                file=sys.stderr,
            )
        return
    require(
        wanted.isdecimal(),
        f"GPU={wanted}: it is a number from 0 on; nvidia-smi lists them, GPUS= is for several, and only make plan "
        "takes the name of a GPU",
    )
    number = int(wanted)
    if shown is not None:
        require(
            number < len(shown),
            f"GPU={wanted}: CUDA_VISIBLE_DEVICES={variable} shows {len(shown) or 'none'}, counted from GPU=0",
        )
        show_one_gpu(shown[number])
    else:
        show_one_gpu(wanted, numbered_by_bus=True)
    from torch.cuda import device_count  # slow to import

    if not device_count() and (missing_gpu() or not list_gpus()):  # any other reason is said where the device is chosen
        raise UserError(f"GPU={wanted}: {missing_gpu() or 'this machine has no NVIDIA GPU that torch can see'}")


def shown_gpus() -> list[str] | None:
    """Returns the entries of CUDA_VISIBLE_DEVICES up to the first that is none, as CUDA does; None where it is not set.

    An entry is a number, or the name of a GPU (GPU-...) or of a MIG instance (MIG-...), which may be shortened.
    """
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return None
    entries: list[str] = []
    for entry in variable.split(","):
        entry = entry.strip()
        if not (entry[:1].isdigit() or entry.startswith(("GPU-", "MIG-"))):  # -1, none, NoDevFiles
            break
        entries.append(entry)
    return entries


def missing_gpu() -> str | None:
    """Returns in one line that CUDA_VISIBLE_DEVICES begins with a GPU that this machine lacks, and names those it has.

    None when it has that GPU, when no GPU is named, and where nvidia-smi does not say what there is.
    """
    shown, listed = shown_gpus(), list_gpus()
    if not shown or not listed:
        return None
    wanted = shown[0]
    gpus = [name for uuid, name in listed.items() if not uuid.startswith("MIG-")]
    if (wanted.isdecimal() and int(wanted) < len(gpus)) or any(uuid.startswith(wanted) for uuid in listed):
        return None
    instances = [uuid for uuid in listed if uuid.startswith("MIG-")]
    there = [f"{number} ({name})" for number, name in enumerate(gpus)] + instances
    return f"{wanted} is no GPU of this machine, which has {', '.join(there)}"


def list_gpus() -> dict[str, str]:
    """Returns the names of GPUs and MIG instances by UUID, in the order of nvidia-smi; nothing where it fails.

    Its lines: "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-...)", "  MIG 1g.10gb     Device  0: (UUID: MIG-...)".
    """
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for line in answer.stdout.splitlines():
        label, _, uuid = line.strip().removesuffix(")").partition("(UUID: ")
        if uuid:
            found[uuid] = label.partition(": ")[2].strip() or label.strip()
    return found
