"""Does the same to many items in several processes, and gives the results in the items' order.

The processes are forked: they share what this one has in memory, and nothing is imported or loaded for them once more.
Of its threads they have none, neither torch's nor a process group's, and a CUDA context that they cannot use. That is
safe for what is Python alone, or native code that neither waits for a thread nor takes a lock that one may hold:

- `do` calls no operation of torch: its threads and the GPU are the parent's, and what is forked would wait for ever.
  Memory of the GPU that the parent holds stays its own, whatever becomes of these processes.
- tokenizers works in one thread here, whatever the user has set for the parent (process_state.become_worker).
- Signals wait until a new process has its own handlers, so none runs the parent's.
- A process ends by os._exit or SIGKILL: no destructor of a library runs, none closes what is the parent's.
"""

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, NamedTuple, TypeVar

from common.process_state import WORKER_SIGNALS, become_worker
from common.recipe import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 3  # items for each process that may be begun before the oldest one is done: results wait in memory


class _Outcome(NamedTuple, Generic[Result]):
    result: Result | None
    error: BaseException | None

    def get(self) -> Result:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]  # there is an error, or a result


def map_in_order(do: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """Yields do(item) for each item, in order. Items and results are pickled.

    What `do` raises is raised here, when its item's turn comes. With one process, and where none can be forked, all is
    done in this one. Raises UserError when a process is killed. The processes end with the iterator, and with this one.
    """
    source = iter(items)
    if processes == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(do, source)
        return
    first = list(islice(source, 1))
    if not first:
        return
    workers: list[_Worker[Item, Result]] = []
    try:
        with _signals_wait():
            for _ in range(processes):
                workers.append(_Worker(do, [worker.pipe for worker in workers]))
        for outcome in _outcomes(chain(first, source), workers):
            yield outcome.get()
    finally:
        for worker in workers:
            worker.end()


def _outcomes(items: Iterator[Item], workers: "list[_Worker[Item, Result]]") -> "Iterator[_Outcome[Result]]":
    """Yields the outcome of each item, in order. An error of `items` itself is the last one."""
    idle, busy = list(workers), dict[Connection, tuple[_Worker[Item, Result], int]]()
    done: dict[int, _Outcome[Result]] = {}
    ready = _next(items)  # read before a process is free, which then has something to do at once
    begun = yielded = 0
    while True:
        while ready is not None and idle and begun - yielded < AHEAD * len(workers):
            if ready.error is not None:
                done[begun], ready = _Outcome(None, ready.error), None
            else:
                worker = idle.pop()
                worker.begin(ready.get())
                busy[worker.pipe] = (worker, begun)
                ready = _next(items)
            begun += 1
        if yielded == begun:
            return
        if yielded not in done:
            for pipe in wait(list(busy)):
                worker, number = busy.pop(pipe)  # type: ignore[call-overload]  # wait returns what it was given
                done[number] = worker.outcome()
                idle.append(worker)
        while yielded in done:
            yielded += 1
            yield done.pop(yielded - 1)


def _next(items: Iterator[Item]) -> _Outcome[Item] | None:
    """The next item, or the error in its place. None after the last."""
    try:
        return _Outcome(next(items), None)
    except StopIteration:
        return None
    except Exception as error:
        return _Outcome(None, error)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Holds back the signals that a forked process handles in its own way, which lets them through when it can."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WORKER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker(Generic[Item, Result]):
    """A process that does one item at a time. pipe: to it; readable when the item is done, or the process has ended.

    inherited: the pipes of the processes that were started before, which this one must not hold open.
    """

    def __init__(self, do: Callable[[Item], Result], inherited: list[Connection]) -> None:
        self.pipe, theirs = Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(do, theirs, [*inherited, self.pipe]), daemon=True
        )
        self.process.start()
        theirs.close()  # so that its end is an end of file here

    def begin(self, item: Item) -> None:
        try:
            self.pipe.send(item)
        except OSError as error:
            raise self._ended() from error

    def outcome(self) -> _Outcome[Result]:
        try:
            outcome: _Outcome[Result] = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        return outcome

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def _ended(self) -> UserError:
        self.process.join()
        status = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        hint = ", which is what Linux does where host memory runs out" if status == -signal.SIGKILL else ""
        return UserError(
            f"a process that prepares the rows {how}{hint}. End what else takes memory, and start again; "
            "with taskset -c 0 before the command one process does it all"
        )


def _serve(do: Callable[[Item], Result], pipe: Connection, of_parent: list[Connection]) -> None:
    """Does the items that come through the pipe, until its other end is closed."""
    for inherited in of_parent:
        inherited.close()  # a pipe that is open here too would not end with the first process
    become_worker()
    with suppress(EOFError, OSError):  # the first process has ended
        while True:
            pipe.send_bytes(_answer(do, pipe.recv()))


def _answer(do: Callable[[Item], Result], item: Item) -> bytes:
    try:
        return pickle.dumps(_Outcome(do(item), None), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        text = traceback.format_exc()
        error.add_note(text)  # where it was raised, which pickle does not keep
        with suppress(Exception):
            answer = pickle.dumps(_Outcome[Any](None, error))
            pickle.loads(answer)
            return answer
        return pickle.dumps(_Outcome[Any](None, RuntimeError(text)))
