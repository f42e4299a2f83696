"""Whether Triton can launch kernels on this machine's GPU, asked before the first launch.

Triton needs more than its package: it compiles a small extension module of Python with the machine's C compiler, links
it to the driver's library, and keeps it and its kernels in a folder of its own (triton 3.7.1: runtime/build.py,
backends/nvidia/driver.py, runtime/cache.py). All this happens at its first launch, when a model is loaded already.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

from common.process_state import captured_stderr

_KEY = hashlib.sha256(b"can be written").hexdigest()  # of an empty file in Triton's folder


@cache
def why_no_triton() -> str | None:
    """Why Triton cannot launch kernels, and what to do, in words for "because ..."; None if it can. Asks once.

    It asks by doing it: Triton builds its launcher, which takes a second the first time, or finds it in its folder.
    """
    try:
        from triton.runtime import driver
        from triton.runtime.cache import get_cache_manager
    except ImportError:
        return "Triton is not installed; it comes with the CUDA build of torch: rm -rf .venv && make setup"
    with captured_stderr() as compiler_output:
        try:
            _ = driver.active
            get_cache_manager(_KEY).put(b"", "empty")
            return None
        except Exception as error:  # each of Triton's steps fails in its own way
            return _explain_failure(error, compiler_output())


def _explain_failure(error: Exception, compiler_output: str) -> str:
    if isinstance(error, AssertionError) or getattr(error, "filename", None) == "/sbin/ldconfig":
        return "Triton does not find the driver's libcuda.so.1: set TRITON_LIBCUDA_PATH to its folder"
    if packages := _missing_packages():
        return f"Triton cannot compile its launcher here: apt install {' '.join(packages)}"
    if isinstance(error, OSError):
        place = error.filename or "the folder of its kernels"
        return f"Triton cannot use {place}: {error.strerror}. TRITON_CACHE_DIR names another folder for its kernels"
    if isinstance(error, subprocess.CalledProcessError):
        lines = compiler_output.splitlines()
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else str(error))
        return f"Triton cannot compile its launcher here: {first.strip()}"
    return f"Triton cannot start its launcher here: {' '.join(str(error).split()) or type(error).__name__}"


def _missing_packages() -> list[str]:
    """Debian's names of the packages without which Triton cannot compile. It looks for them where Triton looks."""
    has_compiler = "CC" in os.environ or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    has_headers = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h").exists()
    headers = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return ["gcc"] * (not has_compiler) + [headers] * (not has_headers)
