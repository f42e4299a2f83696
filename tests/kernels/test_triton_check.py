"""Triton is asked whether it can launch kernels before one is launched; it builds its launcher for real here.

There is no GPU, so the driver's library is a stub: Triton compiles against it, links it and loads what it made. What
is missing on a machine is made missing as it is there: no compiler in PATH, no Python.h, no folder to write to.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from common.kernels import HAS_TRITON, kernel_or_reference
from common.kernels.triton_check import why_no_triton

HEADERS = f"python{sysconfig.get_python_version()}-dev"


@pytest.fixture(scope="module")
def driver_library(tmp_path_factory) -> Path:
    """A folder with a libcuda.so.1 that has the functions that Triton's launcher calls, and none of them does a thing.

    It is loaded, so that the launcher, which asks for a library of this name, can be loaded too.
    """
    if not HAS_TRITON or torch.cuda.is_available() or not shutil.which("gcc"):
        pytest.skip("needs Triton and gcc, and no GPU")
    from triton.backends.nvidia import driver

    folder = tmp_path_factory.mktemp("driver")
    source = Path(driver.dirname, "driver.c").read_text()
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", source)))
    (folder / "stub.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "stub.c"]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library))
    return folder


@pytest.fixture
def gpu_machine(driver_library, tmp_path, monkeypatch):
    """A machine with a GPU that Triton has not been used on yet."""
    import triton.runtime
    from triton.backends.nvidia import driver
    from triton.runtime.driver import DriverConfig

    def forget() -> None:
        for asked in (why_no_triton, driver.libcuda_dirs, driver.library_dirs):
            asked.cache_clear()

    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(driver_library))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.runtime, "driver", DriverConfig())
    forget()
    yield
    forget()


@pytest.fixture
def without_compiler(gpu_machine, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_where_it_can_build_its_launcher_kernels_run(gpu_machine, tmp_path, monkeypatch):
    import triton.runtime
    from triton.runtime.driver import DriverConfig

    assert why_no_triton() is None
    assert list(tmp_path.glob("triton/*/cuda_utils*.so"))
    assert kernel_or_reference(lambda: "kernel", lambda: "reference")() == "kernel"
    # Another process on a machine that lost its compiler since: the launcher is there.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(triton.runtime, "driver", DriverConfig())
    why_no_triton.cache_clear()
    assert why_no_triton() is None


def test_without_a_compiler_it_names_the_package_and_references_run(without_compiler):
    assert why_no_triton() == "Triton cannot compile its launcher here: apt install gcc"
    assert kernel_or_reference(lambda: "kernel", lambda: "reference")() == "reference"


def test_without_python_h_it_names_the_package_in_place_of_what_the_compiler_says(
    gpu_machine, tmp_path, monkeypatch, capfd
):
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: paths | {"include": str(tmp_path)})
    assert why_no_triton() == f"Triton cannot compile its launcher here: apt install {HEADERS}"
    assert capfd.readouterr() == ("", "")


def test_without_both_it_names_both(without_compiler, tmp_path, monkeypatch):
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: paths | {"include": str(tmp_path)})
    assert why_no_triton() == f"Triton cannot compile its launcher here: apt install gcc {HEADERS}"


def test_what_a_compiler_says_otherwise_is_quoted(gpu_machine, tmp_path, monkeypatch, capfd):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'In file included' >&2\necho 'fatal error: no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert why_no_triton() == "Triton cannot compile its launcher here: fatal error: no space left"
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written_is_named(gpu_machine, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    assert re.fullmatch(f"Triton cannot use {tmp_path}/file.*: Not a directory. TRITON_CACHE_DIR .*", why_no_triton())


def test_a_driver_library_that_is_not_found_is_said(gpu_machine, monkeypatch):
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", "")  # then Triton asks ldconfig, which knows none here
    assert why_no_triton() == "Triton does not find the driver's libcuda.so.1: set TRITON_LIBCUDA_PATH to its folder"


def test_where_triton_is_missing_references_run(gpu_machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    assert "Triton is not installed" in why_no_triton()
    assert kernel_or_reference(lambda: "kernel", lambda: "reference")() == "reference"


@pytest.mark.gpu
def test_on_this_machine_kernels_run():
    why_no_triton.cache_clear()
    assert why_no_triton() is None
