"""Run a function on many arguments, in this process, in its threads, or in several processes."""

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
    """Call a function in this process, each call when its result is requested."""
    return with_bar((function(*arguments) for arguments in calls), len(calls), description)


@contextlib.contextmanager
def open_pool(workers: int, threads: bool = False) -> Iterator[Runner]:
    """Yield a runner that shows a bar and uses n processes; a single process is this one.

    New processes are spawned, not forked: a fork would lose the threads of JAX. They end with this
    process, even if it is killed.

    Args:
      workers: n, at least 1.
      threads: whether to use threads of this process instead. They start at once and share the data
        that they read; use them for functions that mostly work without Python's global lock.
    """
    if workers == 1:
        yield run_here
        return
    executor: Executor = (
        ThreadPoolExecutor(workers)
        if threads
        else ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent
        )
    )

    def run(function: Callable, calls: Sequence[tuple], description: str) -> Iterator[Any]:
        waiting = deque(executor.submit(function, *arguments) for arguments in calls)
        # One by one, so that a result is freed after its use.
        results = (waiting.popleft().result() for _ in calls)
        return with_bar(results, len(calls), description)

    with executor:
        try:
            yield run
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):
                # This process must end, and would wait for its children.
                for process in multiprocessing.active_children():
                    process.terminate()
            raise


def _end_with_parent() -> None:
    """End this process when its parent has died, instead of waiting for the next call forever.

    A terminal sends an interrupt to both processes, and only the parent reports it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def with_bar(results: Iterable[Any], number: int, description: str) -> Iterator[Any]:
    """Yield the results of n calls, with a progress bar if there is a terminal."""
    return iter(tqdm(results, description, number, leave=False, unit="part", disable=None))
