"""Threads and memory fit what a container gives, whichever way it says so."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.control_group import available_cpus, cpu_quota, cpus_in_affinity, memory_left
from tests.conftest import ROOT

V1 = Path("/sys/fs/cgroup/cpu")


def file_system(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


V1_LINES = "12:cpuset:/\n3:cpu,cpuacct:{path}\n1:name=systemd:/"
CONTAINERS = {
    "version 2, in a container": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5),
    "version 2, no limit": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, math.inf),
    "version 2, of a group around it": (
        {
            "proc/self/cgroup": "0::/pods/mine",
            "sys/fs/cgroup/pods/mine/cpu.max": "max 100000",
            "sys/fs/cgroup/pods/cpu.max": "100000 50000",
        },
        2.0,
    ),
    "version 2, the least of several": (
        {
            "proc/self/cgroup": "0::/pods/mine",
            "sys/fs/cgroup/pods/mine/cpu.max": "50000 100000",
            "sys/fs/cgroup/pods/cpu.max": "400000 100000",
        },
        0.5,
    ),
    "version 1": (
        {
            "proc/self/cgroup": V1_LINES.format(path="/docker/a:b"),
            "sys/fs/cgroup/cpu,cpuacct/docker/a:b/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/docker/a:b/cpu.cfs_period_us": "100000",
        },
        1.5,
    ),
    "version 1, where the container sees its own group as the top": (
        {
            "proc/self/cgroup": V1_LINES.format(path="/docker/123"),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        3.0,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": V1_LINES.format(path="/"),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        math.inf,
    ),
    "no control groups": ({}, math.inf),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_quota_is_found(tmp_path, container):
    files, quota = CONTAINERS[container]
    assert cpu_quota(file_system(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "cpus"), [("50000", 1), ("100000", 1), ("199000", 1), ("99900000", None)])
def test_there_are_no_more_cpus_than_the_quota_and_the_affinity_have_and_never_none(tmp_path, quota, cpus):
    root = file_system(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{quota} 100000"})
    assert available_cpus(root) == (cpus or cpus_in_affinity())


SHOW = "import common, torch; print(torch.get_num_threads())"


def threads(command: list[str], **variables: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}
    done = subprocess.run(
        [*command, sys.executable, "-c", SHOW], env=clean | variables, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def one_cpu():
    """A command that starts another one in a control group with a quota of one CPU."""
    group = V1 / f"quota-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        pytest.skip(f"needs root and control groups of version 1 at {V1} ({error.strerror})")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    group.rmdir()


def test_torch_takes_no_more_threads_than_a_real_quota_has_unless_told(one_cpu):
    assert threads(one_cpu) == 1
    assert threads(one_cpu, OMP_NUM_THREADS="2") == 2


@pytest.mark.skipif(cpus_in_affinity() < 2, reason="needs two CPUs")
def test_without_a_quota_torch_takes_the_cpus_of_the_affinity():
    assert threads(["taskset", "-c", str(min(os.sched_getaffinity(0)))]) == 1
    assert threads([]) > 1


UNLIMITED = str((1 << 63) - 4096)  # as version 1 says it
LIMITS = {
    "version 2, in a container": (
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": "8000",
            "sys/fs/cgroup/memory.current": "5000",
            "sys/fs/cgroup/memory.stat": "anon 2000\nfile 3000\nshmem 500\ninactive_file 1500\nactive_file 1000",
        },
        8000 - 5000 + 2500,
    ),
    "version 2, of a group around it": (
        {
            "proc/self/cgroup": "0::/pods/mine",
            "sys/fs/cgroup/pods/mine/memory.max": "max",
            "sys/fs/cgroup/pods/mine/memory.current": "10",
            "sys/fs/cgroup/pods/memory.max": "900",
            "sys/fs/cgroup/pods/memory.current": "1000",
            "sys/fs/cgroup/pods/memory.stat": "anon 1000",
        },
        -100,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/docker/a",
            "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": "8000",
            "sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes": "5000",
            "sys/fs/cgroup/memory/docker/a/memory.stat": "inactive_file 1\ntotal_inactive_file 2\ntotal_active_file 3",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0",
        },
        8000 - 5000 + 5,
    ),
    "no control groups": ({}, math.inf),
}


@pytest.mark.parametrize("container", LIMITS)
def test_memory_is_what_the_limit_of_a_container_leaves(tmp_path, container):
    files, left = LIMITS[container]
    assert memory_left(file_system(tmp_path, files)) == left
