"""All that is set for the whole process: environment variables, warnings, loggers, torch's flags, standard output.

Each function says where it is called. Other modules set for the whole process only
- what they undo: signal handlers (run/stopping.py), patches of torch and sys.excepthook while counting (plan/);
- what they add to a library: operators (kernels/), attention (model/attention.py), a table of bitsandbytes (plan/);
- the seed of the random numbers that they draw next, the GPU of this process (machine/collectives.py), and matplotlib's
  backend (run/progress.py).

Standard library only at import: common/__init__.py imports this module before anything else.
"""

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

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
    # Fewer out-of-memory errors from fragmentation when rows have different lengths.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


def set_environment() -> None:
    """Sets environment variables that libraries read when they are imported; a variable that is set stays as it is.

    Called by common/__init__.py: before torch is imported. Processes that this one starts inherit all of them.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _show_one_gpu()
    # On some CPUs bitsandbytes asks for a package that would download native kernels. We load none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _show_one_gpu() -> None:
    """Hides all GPUs but the first from torch, unless torchrun's LOCAL_RANK or CUDA_VISIBLE_DEVICES is set.

    A run without torchrun is one process on one GPU, and transformers' trainer would use every GPU that it sees.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


def prepare_for_plan() -> None:
    """Shortens the imports of a process that only makes a plan. Called by recipes/__main__.py before them."""
    gc.disable()  # the collector would scan all imported modules again and again, and find nothing
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled; bitsandbytes would import the compiler


def quiet_libraries() -> None:
    """Silences messages of libraries that a user can do nothing about. Called before each command."""
    # PEFT 0.21 reads a name that transformers 5.23 calls deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # What accelerate advises instead would broadcast the 4-bit weights to all processes.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    # FSDP2 warns of writing in place into the outputs of our decoder layers, which nobody does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*", category=UserWarning)
    if not sys.stderr.isatty():  # datasets reads it when it is imported, which a plan never does
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def quiet_transformers() -> None:
    """Hides transformers' progress bars, except on a terminal. Called where a model is loaded."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def without_generation_warnings() -> Iterator[None]:
    """Hides what transformers logs of a generation config that is only tried."""
    logger = logging.getLogger("transformers.generation.configuration_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def prepare_launcher(processes: int) -> None:
    """Shares this machine's cores among the processes that a launcher starts here. Called by machine/launch.py.

    Also silences torch's own report of how they ended: the launcher prints one line instead.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


def silence_stdout() -> None:
    """Discards all that this process will print to standard output, as long as it lives.

    Called by machine/collectives.py in every process but the first, which prints for all.
    """
    sys.stdout = open(os.devnull, "w")


def make_deterministic() -> None:
    """Makes torch choose deterministic algorithms, and warn where it has none. Called by run/training.py."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    # torch otherwise also fills memory that nobody has written to, which costs time. Nothing reads such memory here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_tensorboard_folder(folder: Path) -> None:
    """Tells transformers' TensorBoard callback where to write. Called by run/training.py."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))
