"""Tells a failed write from other errors: each library raises its own type, and most of them are no OSError."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.recipe import UserError

CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # the disk or the quota is full
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # this user may not write there
    *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO),  # the disk fails or is gone
}
# safetensors and tokenizers, which are written in Rust, end in the first form; pyarrow has the second.
_NUMBER = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
# torch.save's RuntimeError, which mostly hides the system's reason, and numpy's OSError without a number.
_UNNUMBERED = re.compile(r"inline_container|PytorchStreamWriter|basic_ios|\d+ requested and \d+ written")
_STRERROR = re.compile(r"strerror: (.+)")


def write_failure(error: BaseException) -> str | None:
    """Why a file could not be written, in the system's words; None when the error is no failed write."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBER.search(text)):
        number = int(found[1] or found[2])
    if number is not None:
        return os.strerror(number) if number in CANNOT_WRITE else None
    if not isinstance(error, RuntimeError | OSError) or not _UNNUMBERED.search(text):
        return None
    said = _STRERROR.search(text)
    return said[1] if said else "only a part of it could be written, mostly because the disk is full"


def failure_while_writing(error: BaseException) -> str | None:
    """write_failure of an error in a block that does nothing but write: there any error of the system is one."""
    return write_failure(error) or (error.strerror if isinstance(error, OSError) else None)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns any failure of the disk in a block that does nothing but write `path` into a UserError that names it."""
    try:
        yield
    except Exception as error:
        if (reason := failure_while_writing(error)) is None:
            raise
        raise UserError(f"{path} cannot be written: {reason}") from error
