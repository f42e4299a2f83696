"""Threads fit the CPU that a container gives, whichever way it says so."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cpu_quota import available_cpus, cpu_quota, cpus_in_affinity
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
