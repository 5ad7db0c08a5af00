"""Counts of what happened before each request, in one pass over the events."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, Num

# The number of events that are added at a time.
_CHUNK = 1 << 22

Rows = slice | Int[np.ndarray, "n"]


class Tally:
    """Sums over the first events, in the order of time, more and more of them.

    Attributes:
      sums: [sums, ids], those so far.
      done: how many events they are of.
    """

    def __init__(
        self,
        ids: Int[np.ndarray, "n"],
        values: Callable[[Rows], Sequence[int | Num[np.ndarray, "rows"]]],
        shape: tuple[int, int],
        dtype: type = float,
        order: Int[np.ndarray, "n"] | None = None,
    ) -> None:
        """Starts before the first event.

        Args:
          ids: what each event is of, in [0, `shape[1]`).
          values: gives for some events what each of the sums grows by.
          shape: the number of sums, and of ids.
          dtype: of the sums.
          order: the places of the events in the order of time; None where they stand in it.
        """
        self.sums: Num[np.ndarray, "sums ids"] = np.zeros(shape, dtype)
        self.done = 0
        self._ids, self._values, self._order = ids, values, order

    def of_first(self, end: int) -> Num[np.ndarray, "sums ids"]:
        """The sums over the first `end` events, which are no fewer than the last time."""
        for start in range(self.done, end, _CHUNK):
            rows: Rows = slice(start, min(end, start + _CHUNK))
            if self._order is not None:
                rows = self._order[rows]
            ids = self._ids[rows]
            for row, value in zip(self.sums, self._values(rows), strict=True):
                # A Python integer would take NumPy's slow path.
                np.add.at(row, ids, np.asarray(value, row.dtype))
        self.done = end
        return self.sums
