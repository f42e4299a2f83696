"""Starts a run's processes, one a GPU, as torchrun does and with its own engine, and says in a line how they ended."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from common.recipe import TrainSpec, UserError, require, rows_per_process

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ERROR_STATUS = 2  # of what the user can mend, and was told
OTHERS_GONE = 75  # of a process that ends because another one did
WAITING_SECONDS = 600  # of a machine for the last one to come
ANSWER_SECONDS = 20  # of what answers there to show that it is a run's
RENDEZVOUS_SECONDS = 60  # of a machine for the one they meet at


def launch(train: TrainSpec, gpus: int, nnodes: int = 1, rdzv_endpoint: str | None = None) -> int:
    """Runs this very command in `gpus` processes, on each of `nnodes` machines; the exit status.

    rdzv_endpoint: "host:port" of one of the machines, where they find each other. When a process ends with an error,
    the others are ended too: at once, or 30 s later when they wait for it on the GPU. Raises UserError when there are
    fewer GPUs, when the rows of a step cannot be shared evenly, and when the machines do not find each other.
    """
    require(gpus > 0 and nnodes > 0, f"GPUS={gpus} NNODES={nnodes}: both are at least 1")
    require(
        nnodes == 1 or bool(rdzv_endpoint),
        "NNODES needs RDZV_ENDPOINT=host:port, the same on each: the first one's address",
    )
    from torch.cuda import device_count  # slow to import

    if device_count():
        require(gpus <= device_count(), f"GPUS is {gpus}, and this machine has {device_count()}")
    rows_per_process(train, gpus * nnodes)
    if rdzv_endpoint:
        check_rendezvous(rdzv_endpoint)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the line below says it all
    config = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=gpus,
        run_id="recipes",
        rdzv_backend="c10d",
        rdzv_endpoint=rdzv_endpoint or "localhost:0",  # 0: a port that is free
        rdzv_configs={"read_timeout": RENDEZVOUS_SECONDS, "timeout": WAITING_SECONDS},
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
            f"not all {nnodes} machines came to {rdzv_endpoint} in {WAITING_SECONDS // 60} minutes "
            f"({type(error).__name__}); start the same command on each"
        ) from error
    return 0


def check_rendezvous(endpoint: str) -> None:
    """The machine to meet at can be reached, or is this one and has the port free. Raises UserError where not.

    torch tries again and again, and then says in many lines that it was in vain.
    """
    host, _, port = endpoint.rpartition(":")
    require(
        bool(host) and port.isdigit(),
        f"RDZV_ENDPOINT={endpoint}: it is host:port, as in RDZV_ENDPOINT=192.168.1.10:29500",
    )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: this machine does not know {host} ({error.strerror})") from error
    if _is_of_this_machine(family, address):
        try:
            socket.create_server(("", int(port))).close()
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"RDZV_ENDPOINT={endpoint}: this machine cannot listen there: {error.strerror}"
                ) from error
    else:
        _wait_for(endpoint, address)
    _require_ours(endpoint, host, int(port))


def _is_of_this_machine(family: int, address: tuple[Any, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as place:
        try:
            place.bind((address[0], 0))
        except OSError:
            return False
    return True


def _wait_for(endpoint: str, address: tuple[Any, ...]) -> None:
    """Something answers there. Raises UserError when nothing does for RENDEZVOUS_SECONDS."""
    print(f"waiting for {endpoint}, for {RENDEZVOUS_SECONDS} s at most", flush=True)
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while True:
        try:
            return socket.create_connection(address[:2], timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"RDZV_ENDPOINT={endpoint} cannot be reached: {error.strerror or error}. Start the machine "
                    "with that address first; its firewall must let the port through"
                ) from error
            time.sleep(1)


def _require_ours(endpoint: str, host: str, port: int) -> None:
    """Raises UserError when what answers there is no run's. Asked in a process of its own: torch is loud about it."""
    ask = (
        "import sys, datetime; from torch.distributed import TCPStore; "
        "TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False, wait_for_workers=False, "
        "timeout=datetime.timedelta(seconds=5))"
    )
    try:
        status = subprocess.run(
            [sys.executable, "-c", ask, host, str(port)], capture_output=True, timeout=ANSWER_SECONDS
        ).returncode
    except subprocess.TimeoutExpired:  # what answers waits for more
        status = 1
    if status:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: another program has this port; take another one")


def _without_launch_flags(arguments: list[str]) -> list[str]:
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--gpus", "--nnodes", "--rdzv-endpoint"):
            next(rest, None)
        elif not argument.startswith(("--gpus=", "--nnodes=", "--rdzv-endpoint=")):
            kept.append(argument)
    return kept


def verdict(failures: dict[int, "ProcessFailure"]) -> tuple[int, str | None]:
    """The exit status, and what to say beside what the processes have said themselves; failures: by rank."""
    statuses = {rank: failure.exitcode for rank, failure in sorted(failures.items())}
    if said := [status for status in statuses.values() if status == ERROR_STATUS or status > 128]:
        return said[0], None  # a process said why, or where it stopped
    # The first cause: not one that ended for want of another, nor one that was ended for it.
    causes = [rank for rank, status in statuses.items() if status not in (OTHERS_GONE, -signal.SIGTERM)]
    rank = causes[0] if causes else min(statuses)
    status = statuses[rank]
    how = "failed, as its traceback says" if status > 0 else f"was ended by {_name_of(-status)}"
    hint = " (SIGKILL is what Linux does where host memory runs out)" if status == -signal.SIGKILL else ""
    return 1, f"process {rank} {how}{hint}; the others were ended too. Go on with the same command and ARGS=--resume"


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
