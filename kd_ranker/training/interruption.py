"""Work that ends in good order when the wait for it is interrupted."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def until_interrupted(work: Callable[[Callable[[], bool]], _T]) -> _T:
    """Does some work in a thread of its own, and tells it when it is to end.

    What interrupts a program, as `KeyboardInterrupt`, is raised between any two instructions of its
    main thread, which could leave half-done work behind. Here that thread does nothing but wait.

    Args:
      work: is given a function that says whether to end, and does so in its own good time.

    Returns:
      What `work` returns.

    Raises:
      BaseException: what `work` raises, and, once it has ended, what has interrupted the wait.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, stop.is_set)
        try:
            return future.result()
        except BaseException:
            stop.set()
            future.result()
            raise
