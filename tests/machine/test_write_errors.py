"""The errors are those that the libraries raised on a full tmpfs and on a read-only one."""

import errno
import os

import pytest
from safetensors import SafetensorError

from common.exit_status import exit_status
from common.machine.launch import ERROR_STATUS
from common.machine.write_errors import CANNOT_WRITE, write_failure
from common.recipe import UserError

FAILED = {
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "tokenizers": Exception("Read-only file system (os error 30)"),
    "torch, full": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "torch, read-only": RuntimeError(
        "[enforce fail at inline_container.cc:747] . open file failed with strerror: Read-only file system"
    ),
    "pyarrow": OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    "numpy": OSError("1048576 requested and 13312 written"),
    **{os.strerror(number): OSError(number, os.strerror(number)) for number in CANNOT_WRITE},
}


@pytest.mark.parametrize("name", FAILED)
def test_a_failed_write_of_any_library_is_one_line_with_the_folder(name, capsys):
    def write() -> None:
        raise FAILED[name]

    assert exit_status(write, "outputs/run") == ERROR_STATUS
    failed = "opened" if isinstance(FAILED[name], PermissionError) else "written"  # it may be a file to read
    assert capsys.readouterr().err == f"\nerror: outputs/run cannot be {failed}: {write_failure(FAILED[name])}\n"


def test_the_system_s_reason_is_told_where_the_library_has_it():
    assert write_failure(FAILED["safetensors"]) == os.strerror(errno.ENOSPC)
    assert write_failure(FAILED["tokenizers"]) == write_failure(FAILED["torch, read-only"]) == os.strerror(errno.EROFS)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "config.json"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        ValueError("28"),
        UserError("one line"),
    ],
    ids=repr,
)
def test_other_errors_are_none(error):
    assert write_failure(error) is None
