"""Standard output and error of a process that may lose them: a reader leaves, a terminal is closed, a disk fills.

Standard library only: common/process_state.py puts the streams in place.
"""

import errno
import io
import os
import signal
from contextlib import suppress
from typing import Any, TextIO

READER_GONE = (errno.EPIPE, errno.EIO)  # a pipe that nobody reads, a terminal that was closed
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # under a log file


def is_cell(stream: object) -> bool:
    """Whether the stream is the output below a notebook's cell: of Jupyter, Colab, Kaggle, VS Code, by their kernel.

    It is no terminal. It goes back to the beginning of its last line at a carriage return, and knows no other control.
    """
    return any(kind.__module__.partition(".")[0] == "ipykernel" for kind in type(stream).__mro__)


def protected_stream(stream: TextIO | None, descriptor: int, name: str, *, outlives_reader: bool) -> TextIO:
    """A stream that writes where `stream` writes, and can be lost: process_state.protect_output says what happens then.

    stream: None where it was closed before the process began. descriptor: its number, 1 or 2. name: in words.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream or open(os.devnull, "w")
    stream.flush()
    raw = _Output(descriptor, name, outlives_reader=outlives_reader)
    is_unbuffered = stream.write_through  # python -u
    return io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=descriptor == 2 or raw.isatty(),
        write_through=is_unbuffered,
    )


class _Output(io.FileIO):
    """The bytes of standard output or error."""

    def __init__(self, descriptor: int, name: str, *, outlives_reader: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.what, self.outlives_reader = name, outlives_reader

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_GONE + DISK_FULL:
                raise
            self._lose(error)
        return memoryview(data).nbytes

    def _lose(self, error: OSError) -> None:
        is_gone = error.errno in READER_GONE
        if is_gone or not self.outlives_reader:  # a full disk may have room for later lines
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
        if not self.outlives_reader:
            if not is_gone:
                _write_to_stderr(f"error: {self.what} cannot be written: {error.strerror}\n")
            raise SystemExit(128 + signal.SIGPIPE if is_gone else 2)
        if is_gone and self.fileno() != 2:
            _write_to_stderr(f"warning: {self.what} is lost ({error.strerror}); the work goes on without it\n")


def _write_to_stderr(text: str) -> None:
    with suppress(OSError):  # it is lost as well
        os.write(2, text.encode())
