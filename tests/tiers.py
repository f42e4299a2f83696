"""Which tests were asked for, known before anything asks CUDA what there is: only those of the GPU tier may see a GPU.

tests/conftest.py sets environment() before its other imports: bitsandbytes asks CUDA when it is imported.
Standard library only.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence

_HIDDEN = "GPUS_ARE_HIDDEN_FROM_TESTS"


def environment() -> dict[str, str]:
    """Returns variables that hide the GPU and let Triton's interpreter run its kernels; none for the GPU tier.

    The processes that tests start, and the workers of pytest-xdist, inherit them.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or is_gpu_tier(asked_for(sys.argv[1:])):
        return {}
    return {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", _HIDDEN: "1"}


def gpus_are_hidden() -> bool:
    return _HIDDEN in os.environ


def asked_for(arguments: Sequence[str]) -> str:
    """Returns the marker expression of pytest's command line, or of PYTEST_ADDOPTS; empty where there is none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    everything = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *arguments]
    return str(parser.parse_known_args(everything)[0].m)


def is_gpu_tier(expression: str) -> bool:
    """Returns whether the marker expression asks for tests of the GPU alone: "gpu", "gpu and not slow"."""
    names_gpu, names_others = re.search(r"\bgpu\b", expression), re.search(r"\bor\b|\bnot gpu\b", expression)
    return names_gpu is not None and names_others is None
