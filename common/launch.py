"""Starts a run's processes, one a GPU, as torchrun does and with its own engine, and says in a line how they ended."""

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from common.recipe import TrainSpec, UserError, require, rows_per_process

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ERROR_STATUS = 2  # of what the user can mend, and was told
OTHERS_GONE = 75  # of a process that ends because another one did
MEETING_SECONDS = 60  # that machines try to reach each other; then they wait ten times as long for the last one to come


def launch(train: TrainSpec, gpus: int, machines: int = 1, meet: str | None = None) -> int:
    """Runs this very command in `gpus` processes, on each of `machines` machines; the exit status.

    meet: "host:port" of one of the machines, where they find each other. When a process ends with an error, the others
    are ended too: at once, or 30 s later when they wait for it on the GPU. Raises UserError when there are fewer GPUs,
    when the rows of a step cannot be shared evenly, and when the machines do not find each other.
    """
    require(gpus > 0 and machines > 0, f"GPUS={gpus} MACHINES={machines}: both are at least 1")
    require(
        machines == 1 or meet is not None, "MACHINES needs MEET=host:port, the same on each: the first one's address"
    )
    from torch.cuda import device_count  # slow to import

    if device_count():
        require(gpus <= device_count(), f"GPUS is {gpus}, and this machine has {device_count()}")
    rows_per_process(train, gpus * machines)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the line below says it all
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=gpus,
        run_id="recipes",
        rdzv_backend="c10d",
        rdzv_endpoint=meet or "localhost:0",  # 0: a port that is free
        rdzv_configs={"read_timeout": MEETING_SECONDS, "timeout": 10 * MEETING_SECONDS},
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*_without_launch_flags(sys.orig_argv[1:]))
    except ChildFailedError as error:
        status, line = verdict(error.failures)
        if line:
            print(f"\nerror: {line}", file=sys.stderr)
        return status
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except RendezvousError as error:
        raise UserError(
            f"the machines do not find each other at {meet}: nothing of ours answers there, or another program has the "
            f"port, or not all {machines} came ({type(error).__name__}). MEET is the same on each machine: the address "
            "of one of them, and a free port that a firewall lets through"
        ) from error
    return 0


def _without_launch_flags(arguments: list[str]) -> list[str]:
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--gpus", "--machines", "--meet"):
            next(rest, None)
        elif not argument.startswith(("--gpus=", "--machines=", "--meet=")):
            kept.append(argument)
    return kept


def verdict(failures: dict[int, "ProcessFailure"]) -> tuple[int, str | None]:
    """The exit status, and what to say beside what the processes have said themselves; failures: by rank."""
    first = {rank: failure.exitcode for rank, failure in failures.items() if failure.exitcode != OTHERS_GONE}
    for _, status in sorted(first.items()):
        if status == ERROR_STATUS or status > 128:  # it said why, or where it stopped
            return status, None
    rank, status = min(first.items(), default=(min(failures), 1))
    how = "failed, as its traceback says" if status > 0 else f"was ended by {_name_of(-status)}"
    hint = " (SIGKILL is what Linux does where host memory runs out)" if status == -signal.SIGKILL else ""
    return 1, f"process {rank} {how}{hint}; the others were ended too. Go on with the same command and ARGS=--resume"


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
