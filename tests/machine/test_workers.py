"""Work that is shared out to processes gives what one process gives, and never hangs when one of them ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from common.machine import workers
from common.machine.workers import map_in_order
from common.recipe import UserError
from tests.conftest import ROOT


def double(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is negative")
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.001 * (number % 3))
    return 2 * number


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 100])
def test_the_results_are_in_the_order_of_the_items(processes, count):
    numbers = [number for number in range(count + 1) if number != 13]
    assert list(map_in_order(double, iter(numbers), processes)) == [2 * number for number in numbers]


def test_the_work_is_done_in_so_many_other_processes():
    def wait_and_tell(_: int) -> int:
        time.sleep(0.02)
        return os.getpid()

    found = set(map_in_order(wait_and_tell, range(20), 3))
    assert len(found) == 3 and os.getpid() not in found


def test_an_error_is_raised_in_its_place_and_says_where_it_was_raised():
    results, found = map_in_order(double, [1, 2, -3, 4], 2), []
    with pytest.raises(ValueError, match="-3 is negative") as error:
        found.extend(results)
    assert found == [2, 4] and "in double" in "".join(error.value.__notes__)


def test_an_error_that_cannot_be_pickled_is_told_in_words():
    class Odd(Exception):
        def __reduce__(self):
            raise TypeError

    def fail(_: int) -> None:
        raise Odd("of a kind of its own")

    with pytest.raises(RuntimeError, match="of a kind of its own"):
        list(map_in_order(fail, [1, 2], 2))


def test_an_error_of_the_source_comes_after_the_items_before_it():
    def items():
        yield from (1, 2, 3)
        raise OSError("the disk is gone")

    results = map_in_order(double, items(), 2)
    assert [next(results) for _ in range(3)] == [2, 4, 6]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_a_process_that_is_killed_ends_the_work_with_one_line():
    with pytest.raises(UserError, match="prepares the rows was ended by SIGKILL, which is what Linux does where host"):
        list(map_in_order(double, range(100), 3))


def test_no_more_than_a_few_items_are_read_ahead_of_the_oldest_one():
    read = []

    def items():
        for number in range(1000):
            read.append(number)
            yield number

    def slow_at_first(number: int) -> int:
        time.sleep(0.3 if number == 0 else 0)
        return number

    next(map_in_order(slow_at_first, items(), 2))
    assert len(read) <= 2 * workers.AHEAD + 2


SCRIPT = """
import os, sys, time
from common.machine.workers import map_in_order

def tell(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once, whatever the other process writes
    time.sleep(0.05)

try:
    for _ in map_in_order(tell, range(10**6), 2):
        pass
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number, status", [("SIGINT", 130), ("SIGTERM", -15), ("SIGHUP", -1), ("SIGKILL", -9)])
def test_a_signal_leaves_no_process_behind(number, status):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        children = {int(process.stdout.readline()) for _ in range(10)}
        process.send_signal(signal.Signals[number])
        _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert not errors
    deadline = time.monotonic() + 10
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_in_the_moment_of_a_fork_ends_no_process_in_a_way_of_its_own(monkeypatch, capfd):
    process = multiprocessing.get_context("fork").Process
    start, run = process.start, process.run

    def start_and_signal(self):
        start(self)
        os.kill(self.pid, signal.SIGINT)

    def run_late(self):
        time.sleep(0.1)  # the signal is there before its own handlers are
        run(self)

    monkeypatch.setattr(process, "start", start_and_signal)
    monkeypatch.setattr(process, "run", run_late)
    assert list(map_in_order(double, range(5), 3)) == [0, 2, 4, 6, 8]
    assert not capfd.readouterr().err


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
