"""All that is set for the whole process: environment variables, warnings, loggers, torch's flags, standard output.

Each function says where it is called. Other modules set for the whole process only
- what they undo: signal handlers (run/stopping.py, machine/launch.py), patches of torch and sys.excepthook while
  counting (plan/);
- what they add to a library: operators (kernels/), attention (model/attention.py), a table of bitsandbytes (plan/);
- the seed of the random numbers that they draw next, and the GPU of this process (machine/collectives.py).

Standard library only at import: common/__init__.py imports this module before anything else.
"""

import contextlib
import csv
import gc
import io
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from common.control_group import available_cpus, cpus_in_affinity
from common.output_stream import protected_stream

_ENVIRONMENT = {
    # TRL reports each trainer that is built, and huggingface_hub each download, unless told not to.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # transformers otherwise asks the hub, in a thread, to convert pickled weights. We load safetensors only.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    # The tokenizers library otherwise warns when a process that used it is forked.
    "TOKENIZERS_PARALLELISM": "false",
    # A thread count that changes with the load changes the order of sums: runs would differ in their last bits.
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
    # cuBLAS is deterministic only with a fixed workspace (PyTorch notes, "Reproducibility").
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Fewer out-of-memory errors from fragmentation when rows have different lengths. And page-locked host memory in its
    # exact size above 4 MiB (common/machine/host_memory.py): up to there blocks are powers of two, and kept for reuse,
    # because small ones come and go in every step (an adapter's gradients). With pinned_max_round_threshold_mb alone
    # torch 2.13 may give out a kept block that is too small (pytorch pull request 192722).
    "PYTORCH_ALLOC_CONF": "expandable_segments:True,pinned_max_cached_size_mb:4",
}


# What torchrun tells each process of a run; accelerate and transformers read these too.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ignored_variables: list[str] = []  # those of a launcher that were set, and not by one


def _ignore_half_a_launch() -> None:
    """Removes RANK and the like unless all of them are set: `make finetune RANK=64` is no process of a run."""
    if all(name in os.environ for name in LAUNCHER_VARIABLES):
        return
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if os.environ.pop(name, None) is not None:
            ignored_variables.append(name)


def set_environment() -> None:
    """Sets environment variables that libraries read when they are imported; a variable that is set stays as it is.

    Called by common/__init__.py: before torch is imported. Processes that this one starts inherit all of them.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _ignore_half_a_launch()
    _share_cpus()
    # On some CPUs bitsandbytes asks for a package that would download native kernels. We load none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def show_one_gpu(entry: str, *, numbered_by_bus: bool = False) -> None:
    """Hides all GPUs but one from this process, and from those that it starts. Called by machine/gpus.py.

    entry: of CUDA_VISIBLE_DEVICES, which CUDA reads once, when it is first asked. numbered_by_bus: the entry is a
    number of nvidia-smi, which counts by bus; CUDA itself counts the fastest GPU first.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = entry
    if numbered_by_bus:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"


_threads_are_ours = False  # OMP_NUM_THREADS was set here, and not by the user


def _share_cpus() -> None:
    """Makes torch's threads on the CPU (OpenMP's) fit beside other processes, and into a container's CPU quota.

    A thread that waits for another one spins on its core 300,000 times before it lets others run there, who may be what
    it waits for: beside a busy process a step takes several times as long. With 1,000 it gives way soon, which costs
    some speed on a quiet machine: docs/speed.md has the figures.
    """
    global _threads_are_ours
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "OMP_NUM_THREADS" not in os.environ and available_cpus() < cpus_in_affinity():
        os.environ["OMP_NUM_THREADS"] = str(available_cpus())
        _threads_are_ours = True


def prepare_for_plan() -> None:
    """Shortens the imports of a process that only makes a plan. Called by recipes/__main__.py before them."""
    gc.disable()  # the collector would scan all imported modules again and again, and find nothing
    leave_out_compiler()


def leave_out_compiler() -> None:
    """Shortens the imports of a process that computes nothing. Called by recipes/__main__.py before them."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled; bitsandbytes would import the compiler


def quiet_libraries() -> None:
    """Silences messages of libraries that a user can do nothing about. Called before each command."""
    # PEFT 0.21 reads a name that transformers 5.23 calls deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # What accelerate advises instead would broadcast the 4-bit weights to all processes.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    # FSDP2 warns of writing in place into the outputs of our decoder layers, which nobody does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*", category=UserWarning)
    # torch says so in the first backward pass of a run on a GPU (ATen/native/transformers/cuda/attention_backward.cu).
    # docs/reliability.md says what it means. Other operators without a deterministic form still warn.
    text = "(Flash|Memory Efficient) Attention defaults to a non-deterministic algorithm"
    warnings.filterwarnings("ignore", message=text, category=UserWarning)
    # So does the thread of that pass when it begins with a matmul (ATen/cuda/CublasHandlePool.cpp).
    text = "Attempting to run cuBLAS, but there was no current CUDA context"
    warnings.filterwarnings("ignore", message=text, category=UserWarning)
    # matplotlib draws a box where its font lacks a letter of a run's or model's name.
    warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
    # The pad token is the recipe's (load_tokenizer chooses it), and what ends an answer is asked for by name.
    logging.getLogger("transformers.trainer_utils").addFilter(_is_not_about_special_tokens)
    # datasets reads it when it is imported, which a plan never does. Our own lines tell of slow work.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _is_not_about_special_tokens(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("The tokenizer has new PAD/BOS/EOS tokens")


def allow_large_csv_cells(limit: int) -> None:
    """Allows cells of up to `limit` characters in a CSV file, not only 128 KiB. Called before one is read."""
    csv.field_size_limit(limit)


def quiet_transformers(*, also_on_terminal: bool = False) -> None:
    """Hides transformers' progress bars; those on a terminal only if asked. Called where a model is loaded."""
    if also_on_terminal or not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def quiet_hub_uploads() -> None:
    """Hides huggingface_hub's progress bars and its warnings. Called by machine/hub_upload.py, which prints lines."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub.hf_api").setLevel(logging.ERROR)


@contextlib.contextmanager
def without_generation_warnings() -> Iterator[None]:
    """Hides what transformers logs of a generation config that is only tried."""
    logger = logging.getLogger("transformers.generation.configuration_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def protect_output(*, outlives_reader: bool) -> None:
    """Lets standard output and error get lost without a traceback. Called by recipes/__main__.py.

    When a reader leaves (`| head`) or the terminal is closed, outlives_reader says what happens: the process goes on
    and /dev/null takes the stream's place, or it exits with 141 as other programs do. On a full disk the one loses
    the lines that did not fit, the other exits with 2.
    """
    sys.stdout = protected_stream(sys.stdout, 1, "standard output", outlives_reader=outlives_reader)
    sys.stderr = protected_stream(sys.stderr, 2, "standard error", outlives_reader=outlives_reader)


def prepare_launcher(processes: int) -> None:
    """Shares the CPUs among the processes that a launcher starts here. Called by machine/launch.py.

    Also silences torch's own report of how they ended: the launcher prints one line instead. And it leaves the
    signals that the launcher hands on to the launcher.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    if _threads_are_ours or "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cpus() // processes))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


WORKER_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # are not handled in a worker as in its parent


def become_worker() -> None:
    """Sets a forked process apart from its parent, and lets the signals through that waited for it.

    Called by machine/workers.py in each, with WORKER_SIGNALS blocked.
    """
    gc.freeze()  # the collector would write to all of the memory that is shared with the parent
    # Not the user's choice here: after a fork tokenizers would wait for threads that only the parent has.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WORKER_SIGNALS)


def silence_stdout() -> None:
    """Discards all that this process will print to standard output, as long as it lives.

    Called by machine/collectives.py in every process but the first, which prints for all.
    """
    sys.stdout = open(os.devnull, "w")


def accept_any_bytes() -> None:
    """Reads bytes that are no text from a pipe as lone surrogates. Called by commands/chat.py.

    In a UTF-8 locale Python otherwise raises where it reads them, and loses the lines behind them.
    """
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(errors="surrogateescape")


def edit_lines() -> None:
    """Gives input() on a terminal a history, editing keys, and pasted lines as one. Called by adapter/chat.py.

    Terminals say where a pasted text begins and ends ("bracketed paste"). GNU readline understands them, and Python
    tells it not to. Without readline, or with libedit in its place, each pasted line is read by itself.
    """
    with contextlib.suppress(ImportError):
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


@contextlib.contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """Keeps what is written to standard error inside, also by child processes, from the user; gives it as text.

    Called by kernels/triton_check.py, for what a compiler says.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:

        def text() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        own = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(own, 2)
            os.close(own)


def make_deterministic() -> None:
    """Makes torch choose deterministic algorithms, and warn where it has none. Called by run/training.py."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    # torch otherwise also fills memory that nobody has written to, which costs time. Nothing reads such memory here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def full_precision_sums() -> Iterator[None]:
    """Keeps the sums of 16-bit matmuls on a GPU in fp32 within the block. Called by model/loss.py.

    torch allows cuBLAS to split a matmul along its inner dimension, to round the parts to 16 bits and to add those up
    (ATen/cuda/CUDABlas.cpp: the mask of reduction schemes). With this it may split, and adds in fp32.
    """
    import torch

    matmul: Any = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names}
    for name, (_, may_split) in before.items():
        setattr(matmul, name, (False, may_split))
    try:
        yield
    finally:
        for name, allowed in before.items():
            setattr(matmul, name, allowed)


_told_trackers: dict[str, str] = {}  # variables that set_tracker_variable has set


def set_tracker_variable(variable: str, value: str) -> None:
    """Tells a tracker by its own environment variable where to write, or a run's name. Called by run/trackers.py.

    A variable that the user has set stays as it is.
    """
    if os.environ.get(variable) in (
        None,
        _told_trackers.get(variable),
    ):  # not set, or by an earlier run of this process
        os.environ[variable] = _told_trackers[variable] = value
