import threading
import time

import pytest

from common.machine.device import GIB
from common.model.loading_progress import announce_loading, report_progress
from common.recipe import ModelSpec

SPEC = ModelSpec("owner/model")


@pytest.mark.parametrize(
    ("files", "size", "quantizes", "line"),
    [
        (4, 15 * GIB, True, "loading owner/model: 4 files, 15.00 GiB, quantized to NF4 as they are read\n"),
        (1, 2 * GIB, False, "loading owner/model: 1 file, 2.00 GiB\n"),
        (0, 15 * GIB, True, "loading owner/model: random weights, 15.00 GiB, quantized to NF4 as they are drawn\n"),
        (4, GIB - 1, True, ""),  # is there within a few seconds
    ],
)
def test_a_large_model_is_announced_and_a_small_one_is_not(files, size, quantizes, line, capsys):
    announce_loading(SPEC, files, size, quantizes=quantizes)
    assert capsys.readouterr().out == line


def test_a_long_block_prints_a_line_every_so_often_and_none_after_its_end(capsys):
    threads = threading.active_count()
    with report_progress(lambda seconds: f"after {seconds:.1f} s", every_s=0.05):
        time.sleep(0.5)
    assert threading.active_count() == threads
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 10
    assert lines[0].startswith("after 0.")


def test_a_short_block_prints_nothing_and_an_error_comes_through(capsys):
    with pytest.raises(KeyError), report_progress(lambda seconds: "still there"):
        raise KeyError
    assert capsys.readouterr().out == ""
