"""What the recipes share: loading, adapters, activation checkpointing, data, training.

Importing this package sets the process up, before torch is imported; a variable that is already set stays as it is.
"""

import logging
import os
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent  # with models/, data/ and recipes/ in it

_ENVIRONMENT = {
    # TRL reports each trainer it builds, huggingface_hub each download, unless told not to.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # transformers otherwise asks the hub, in a thread, to convert pickled weights; we load safetensors only.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A thread count that changes with the load changes the order of sums: runs would differ in their last bits.
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
    # cuBLAS is deterministic only with a fixed workspace (PyTorch notes, "Reproducibility").
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Fewer out-of-memory errors from fragmentation when rows have different lengths.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}

if "LOCAL_RANK" not in os.environ:  # not under torchrun: one process, one GPU; the trainer would take all it sees
    _ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = "0"

for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# On some CPUs bitsandbytes asks for a package that would download native kernels; we load none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
