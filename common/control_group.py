"""What a process may use of CPUs and memory, which in a container is less than the machine has.

Standard library only.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs of this process's affinity, or fewer by the quota of its control group; at least 1.

    A quota of 1.5 CPUs is one CPU: of two threads each would wait for the other half of the time. root: of the file
    system with proc and sys.
    """
    return max(1, int(min(cpus_in_affinity(), cpu_quota(root))))


def cpus_in_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs that this process's control group may use, in time per time; infinite without a limit.

    The least of the group and those around it, of version 1 and 2 (Linux, Documentation/admin-guide/cgroup-v2.rst and
    Documentation/scheduler/sched-bwc.rst).
    """
    return min((_quota_of(folder) for folder in _control_groups("cpu", root)), default=math.inf)


def memory_left(root: Path = Path("/")) -> float:
    """Bytes that this process's control group may still take; infinite without a limit.

    The least of the group and those around it, as cpu_quota. What the kernel has cached of files counts as free: it
    drops that first (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst).
    """
    return min((_memory_left_in(folder) for folder in _control_groups("memory", root)), default=math.inf)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group and those around it, as far as they are visible in a container."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                mounts = ["", "unified"]
            elif controller in controllers.split(","):
                mounts = [controllers, "cpu"]
            else:
                continue
            for top in (root / "sys/fs/cgroup" / mount for mount in mounts):
                group = top / path.strip("/")
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _quota_of(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


def _memory_left_in(folder: Path) -> float:
    for limit, used, prefix in (
        ("memory.max", "memory.current", ""),  # version 2
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # 1; without a limit 2**63 less a page
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            amounts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return left + sum(int(amounts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return math.inf
