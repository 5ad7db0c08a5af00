"""Run a function on many arguments, in this thread or in several threads."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

# (function, arguments of each call, description) -> the results, in the order of the calls.
Runner = Callable[[Callable, Sequence[tuple], str], Iterator[Any]]


def run_here(function: Callable, calls: Sequence[tuple], description: str) -> Iterator[Any]:
    """Call a function in this process, each call when its result is requested."""
    return with_bar((function(*arguments) for arguments in calls), len(calls), description)


@contextlib.contextmanager
def open_pool(threads: int) -> Iterator[Runner]:
    """Yield a runner that uses n threads of this process and shows a bar; one thread is this one.

    Use it for functions that mostly work without Python's global lock. Threads start at once and
    share the data that they read.
    """
    if threads == 1:
        yield run_here
        return

    def run(function: Callable, calls: Sequence[tuple], description: str) -> Iterator[Any]:
        waiting = deque(executor.submit(function, *arguments) for arguments in calls)
        # One by one, so that a result is freed after its use.
        results = (waiting.popleft().result() for _ in calls)
        return with_bar(results, len(calls), description)

    with ThreadPoolExecutor(threads) as executor:
        try:
            yield run
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def with_bar(results: Iterable[Any], number: int, description: str) -> Iterator[Any]:
    """Yield the results of n calls, with a progress bar if there is a terminal."""
    return iter(tqdm(results, description, number, leave=False, unit="part", disable=None))
