import io
import sys
import threading
import time

import pytest

from common.machine import slow_work
from common.machine.slow_work import format_duration, report_slow_work, seconds_between_statuses, show_status
from tests.notebook_cell import OutStream


def test_work_that_is_quick_is_not_mentioned(capsys):
    with report_slow_work("a blink", 3, "rows"):
        pass
    assert capsys.readouterr().out == ""


def test_long_work_says_what_it_does_and_how_far_it_is(capsys):
    with report_slow_work("held-out loss", 200, "rows", first_seconds=0.05, every_seconds=0.05) as work:
        time.sleep(0.08)
        work.done = 40
        time.sleep(0.06)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "held-out loss: 0 of 200 rows, 0:00"
    assert "held-out loss: 40 of 200 rows, 0:00" in lines[1:]


def test_what_nobody_can_count_tells_its_time(capsys):
    with report_slow_work("loading", first_seconds=0.02):
        time.sleep(0.1)
    assert capsys.readouterr().out == "loading, 0:00\n"


def test_the_thread_ends_with_the_block_even_when_it_fails():
    before = threading.active_count()
    with pytest.raises(ValueError, match="on purpose"), report_slow_work("a failure", first_seconds=0.01):
        raise ValueError("on purpose")
    assert threading.active_count() == before


def test_only_the_main_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with report_slow_work("loading", first_seconds=0.01):
        time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_on_a_terminal_a_status_takes_the_place_of_the_one_before(capsys, monkeypatch):
    monkeypatch.setattr(slow_work.sys.stdout, "isatty", lambda: True)
    show_status("step 1")
    show_status("step 2", keep=True)
    show_status("")
    assert capsys.readouterr().out == "\r\033[Kstep 1\r\033[Kstep 2\n\r\033[K"


def test_below_a_cell_a_status_takes_the_place_of_the_one_before_without_a_terminals_codes(monkeypatch):
    monkeypatch.setattr(sys, "stdout", cell := OutStream())
    show_status("a long status of the first part")
    show_status("step 2", keep=True)
    show_status("step 3")
    show_status("")
    print("and a line")
    assert cell.lines() == ["step 2", "and a line", ""]
    assert "\033" not in cell.getvalue()


def test_a_status_is_shown_as_often_as_its_place_can_be_written_anew(monkeypatch):
    monkeypatch.setattr(sys, "stdout", OutStream())
    assert seconds_between_statuses(7) == slow_work.CELL_SECONDS
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert seconds_between_statuses(7) == 7
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert seconds_between_statuses(7) == 0


def test_durations():
    assert [format_duration(seconds) for seconds in (0.4, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
