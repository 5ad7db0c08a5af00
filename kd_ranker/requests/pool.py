"""The same function on many arguments, in this process, in threads of it, or in several."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

# (function, arguments of each call, description) -> the results, in the order of the calls.
Runner = Callable[[Callable, Sequence[tuple], str], Iterator[Any]]


def run_here(function: Callable, calls: Sequence[tuple], description: str) -> Iterator[Any]:
    """Calls a function in this process, one call after the other, each when its result is asked."""
    return with_bar((function(*arguments) for arguments in calls), len(calls), description)


@contextlib.contextmanager
def open_pool(processes: int) -> Iterator[Runner]:
    """Gives what runs a function in so many processes, with a bar; with one, it is this one.

    New processes are started afresh, not forked: JAX has threads, which a fork would lose. They end
    with this one, even where that is killed.
    """
    if processes == 1:
        yield run_here
        return
    context = multiprocessing.get_context("spawn")
    with _running(
        ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
    ) as run:
        yield run


@contextlib.contextmanager
def open_threads(threads: int) -> Iterator[Runner]:
    """Gives what runs a function in so many threads of this process, with a bar.

    For functions that leave most of their work to what does without Python's lock: threads are
    there at once, and share what they read.
    """
    if threads == 1:
        yield run_here
        return
    with _running(ThreadPoolExecutor(threads)) as run:
        yield run


@contextlib.contextmanager
def _running(executor: Executor) -> Iterator[Runner]:
    def run(function: Callable, calls: Sequence[tuple], description: str) -> Iterator[Any]:
        waiting = deque(executor.submit(function, *arguments) for arguments in calls)
        # One by one, so that a result is not held longer than it is used.
        results = (waiting.popleft().result() for _ in calls)
        return with_bar(results, len(calls), description)

    with executor:
        try:
            yield run
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):
                # This process is to end, and would wait for what they do.
                for process in multiprocessing.active_children():
                    process.terminate()
            raise


def _end_with_parent() -> None:
    """Ends this process when its parent has died: it would wait for the next call for ever.

    A terminal sends an interruption to both, and the parent alone has something to say to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def with_bar(results: Iterable[Any], number: int, description: str) -> Iterator[Any]:
    """The results of so many calls, with a bar, which is absent where there is no terminal."""
    return iter(tqdm(results, description, number, leave=False, unit="part", disable=None))
