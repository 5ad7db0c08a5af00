"""A trace of a few steps of a run, in `profile/` of its workdir.

XProf and Perfetto show it. Each step in the trace is a call of its own, and marked as a step.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from kd_ranker.training.processes import is_first

FOLDER = "profile"
# The window of a run without `train.profile`: after the calls that compile.
_DEFAULT = (10, 4)


class Profiler:
    """Starts and stops the trace of the steps of a window, once the run is there."""

    def __init__(self, workdir: Path, window: Sequence[int]):
        """`window` is `train.profile`: the first step, counted from 1, and the number of steps."""
        first, number = window or _DEFAULT
        self._folder = workdir / FOLDER
        self._window = range(first, first + number)
        self._traces = False

    def most(self, step: int) -> int:
        """Return how many steps the call after `step` may take, of those that it wants to."""
        following = step + 1
        if following in self._window:
            return 1
        to_start = self._window.start - following
        return to_start if self._window and to_start > 0 else 2**31

    @contextlib.contextmanager
    def call(self, step: int) -> Iterator[bool]:
        """Mark the call after `step`; yield whether it is traced: then it must end in the block."""
        following = step + 1
        if following not in self._window or not is_first():
            yield False
            return
        if not self._traces:
            # The caller may be tracing the whole run; JAX makes one trace at a time.
            with contextlib.suppress(RuntimeError):
                jax.profiler.start_trace(self._folder, profiler_options=_options())
                self._traces = True
        with jax.profiler.StepTraceAnnotation("train", step_num=following):
            yield True
        if following == self._window[-1]:
            self.close()

    def close(self) -> None:
        """Write the trace, if there is one."""
        if self._traces:
            jax.profiler.stop_trace()
        self._traces = False


def _options() -> jax.profiler.ProfileOptions:
    """Return options without the calls of Python, which may make a trace fifty times larger."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options
