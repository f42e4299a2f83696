"""Starts the processes of a run, one a GPU, with torchrun's own engine, and says in one line how they ended."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from common.process_state import prepare_launcher
from common.recipe import TrainSpec, UserError, require, rows_per_process

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ERROR_STATUS = 2  # exit status of a process that has printed a UserError
PEER_LOST_STATUS = 75  # exit status of a process that ends because another one did
JOIN_TIMEOUT_SECONDS = 600  # until all machines have come to the endpoint
CONNECT_TIMEOUT_SECONDS = 60  # until the endpoint answers
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A signal may reach a process directly, through make and through the launcher. Nobody types so fast.
ONE_SIGNAL_SECONDS = 0.25
PROBE_TIMEOUT_SECONDS = 20  # for what answers there to prove that it is the store of a run


def launch(train: TrainSpec, gpus: int, nnodes: int = 1, rdzv_endpoint: str | None = None) -> int:
    """Runs this very command in `gpus` processes, on each of `nnodes` machines. Returns the exit status.

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

    if count := device_count():  # through NVML: this process gets no CUDA context
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        there = "this machine has" if shown is None else f"CUDA_VISIBLE_DEVICES={shown} shows"
        require(gpus <= count, f"GPUS is {gpus}, and {there} {count}")
    rows_per_process(train, gpus * nnodes)
    if rdzv_endpoint:
        check_rendezvous(rdzv_endpoint)
    return _run_processes(gpus, nnodes, rdzv_endpoint)


def _run_processes(gpus: int, nnodes: int, rdzv_endpoint: str | None) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    prepare_launcher(gpus)
    signals = _ForwardedSignals()
    config = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=gpus,
        run_id="recipes",
        rdzv_backend="c10d",
        rdzv_endpoint=rdzv_endpoint or "localhost:0",  # 0: any free port
        rdzv_configs={"read_timeout": CONNECT_TIMEOUT_SECONDS, "timeout": JOIN_TIMEOUT_SECONDS},
        max_restarts=0,
    )
    try:
        with signals:
            elastic_launch(config, sys.executable)(*_without_launch_flags(sys.orig_argv[1:]))
    except ChildFailedError as error:
        status, line = explain_failures(error.failures)
        if line and signals.received:  # it came before the processes were ready to stop with a checkpoint
            return 128 + signals.received
        if line:
            print(f"\nerror: {line}", file=sys.stderr)
        return status
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except RendezvousError as error:
        raise UserError(
            f"not all {nnodes} machines came to {rdzv_endpoint} in {JOIN_TIMEOUT_SECONDS // 60} minutes "
            f"({type(error).__name__}); start the same command on each"
        ) from error
    return 0


class _ForwardedSignals:
    """Inside its `with` block a signal goes to the processes of the run, which stop when they have a checkpoint.

    torch's own handlers would kill them after 30 s, and leave them alone at a second signal. That one ends them here,
    by torch: with the same signal, and 30 s later with SIGKILL. SIGHUP insists on nothing (run/stopping.py says why),
    and stays ignored where it is.
    """

    def __init__(self) -> None:
        self.received = 0
        self.insists_from = float("inf")  # the time from which another signal insists
        self.insisted = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        heard = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._receive) for number in heard}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        from psutil import NoSuchProcess, Process
        from torch.distributed.elastic.multiprocessing.api import SignalException

        is_first, processes = not self.received, Process().children()
        insists = number != signal.SIGHUP and time.monotonic() > self.insists_from
        if number != signal.SIGHUP:
            self.insists_from = min(self.insists_from, time.monotonic() + ONE_SIGNAL_SECONDS)
        self.received = number if number != signal.SIGHUP else self.received or number
        if self.insisted:
            return
        if insists or (is_first and not processes):
            self.insisted = insists
            raise SignalException(f"signal {number}", signal.Signals(number))
        for process in processes:
            with contextlib.suppress(NoSuchProcess):
                process.send_signal(number)


def check_rendezvous(endpoint: str) -> None:
    """Raises UserError unless the endpoint can be reached, or is a free port of this machine.

    torch itself would try for long, and then fail with many lines that do not name the cause.
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
    if _is_local_address(family, address):
        try:
            socket.create_server(("", int(port))).close()
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"RDZV_ENDPOINT={endpoint}: this machine cannot listen there: {error.strerror}"
                ) from error
    else:
        _wait_for_endpoint(endpoint, address)
    _require_rendezvous_store(endpoint, host, int(port))


def _is_local_address(family: int, address: tuple[Any, ...]) -> bool:
    """Returns whether the address is one of this machine's: only to those can a socket be bound."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0))
        except OSError:
            return False
    return True


def _wait_for_endpoint(endpoint: str, address: tuple[Any, ...]) -> None:
    """Waits until something answers there. Raises UserError after CONNECT_TIMEOUT_SECONDS."""
    print(f"waiting for {endpoint}, for {CONNECT_TIMEOUT_SECONDS} s at most", flush=True)
    deadline = time.monotonic() + CONNECT_TIMEOUT_SECONDS
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


def _require_rendezvous_store(endpoint: str, host: str, port: int) -> None:
    """Raises UserError when another program answers there than the store of a run.

    The probe is a process of its own, because torch prints much when it fails.
    """
    probe = (
        "import sys, datetime; from torch.distributed import TCPStore; "
        "TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False, wait_for_workers=False, "
        "timeout=datetime.timedelta(seconds=5))"
    )
    try:
        status = subprocess.run(
            [sys.executable, "-c", probe, host, str(port)], capture_output=True, timeout=PROBE_TIMEOUT_SECONDS
        ).returncode
    except subprocess.TimeoutExpired:  # the other program waits for more to be sent
        status = 1
    if status:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: another program has this port; take another one")


def _without_launch_flags(arguments: list[str]) -> list[str]:
    """Returns the command line that each process gets: without the flags that launch has consumed."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--gpus", "--nnodes", "--rdzv-endpoint"):
            next(rest, None)
        elif not argument.startswith(("--gpus=", "--nnodes=", "--rdzv-endpoint=")):
            kept.append(argument)
    return kept


def explain_failures(failures: dict[int, "ProcessFailure"]) -> tuple[int, str | None]:
    """Returns the exit status of the run, and a line that names the process that failed first.

    The line is None when a process has printed the reason itself. failures: by rank.
    """
    statuses = {rank: failure.exitcode for rank, failure in sorted(failures.items())}
    explained = [status for status in statuses.values() if status == ERROR_STATUS or status > 128]
    if explained:  # a process has printed its error, or at which step a signal stopped it
        return explained[0], None
    # Not the cause: processes that lost another one, and those that were ended because of it.
    causes = [rank for rank, status in statuses.items() if status not in (PEER_LOST_STATUS, -signal.SIGTERM)]
    rank = causes[0] if causes else min(statuses)
    status = statuses[rank]
    how = "failed, as its traceback says" if status > 0 else f"was ended by {_signal_name(-status)}"
    hint = " (SIGKILL is what Linux does where host memory runs out)" if status == -signal.SIGKILL else ""
    return 1, f"process {rank} {how}{hint}; the others were ended too. Go on with the same command and ARGS=--resume"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
