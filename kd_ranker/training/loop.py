"""The training loop: a call of some steps, then a line of metrics, an evaluation, a checkpoint.

After an evaluation, halving may stop the runs of settings that are behind, and early stopping those
that no longer improve.
"""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.manifest import Provenance
from kd_ranker.progress import Bar
from kd_ranker.tracking.tracker import Tracker
from kd_ranker.training import checkpoints
from kd_ranker.training.active_runs import ActiveRuns
from kd_ranker.training.divergence import mark_diverged, report_diverged
from kd_ranker.training.early_stopping import BestStates
from kd_ranker.training.interruption import deferred
from kd_ranker.training.profile import Profiler
from kd_ranker.training.program import (
    Program,
    abstract_states,
    by_run,
    compiled_steps,
    initial_states,
    states_on_host,
    take_steps,
)
from kd_ranker.training.specs import Stack
from kd_ranker.training.speed import SpeedMeter, flops_of, sizes_of
from kd_ranker.training.state import States, TrainState
from kd_ranker.training.step import StepMetrics
from kd_ranker.training.workdir import MetricsWriter


class Evaluated(NamedTuple):
    """The findings of an evaluation during training."""

    scalars: dict[str, float]  # by name, for the metrics
    criteria: Mapping[str, float]  # by run, for early stopping; smaller is better
    behind: Collection[str]  # the runs that halving would stop


# (the states of all runs on the host, the names of those to evaluate) -> findings
Evaluate = Callable[[States, Collection[str]], Evaluated]
Begin = Callable[[States], States]

# Seconds to compile one stack, or all that they share, on two slow cores.
_SECONDS_TO_COMPILE = 4
# Seconds that the steps of one call may take: a signal is noticed between two calls.
_LONGEST_CALL = 2.0


def fit(
    program: Program,
    train: ConfigDict,
    workdir: Path,
    provenance: Provenance,
    evaluate: Evaluate,
    bar: Bar,
    tracker: Tracker,
    begin: Begin | None = None,
    halving: Sequence[int] = (),
) -> States:
    """Train until the last run is done, from the newest checkpoint in `workdir` if any.

    A run with a loss that stops being finite is reported and keeps its state. The others continue;
    training ends early if no run is left. After a signal to end the process, the state is saved
    once more, and the signal is handled when that checkpoint is complete.

    Args:
      program: the runs, their batches and devices.
      train: `config.train` or `config.teacher.train`; its `…_every` count here.
      workdir: gets checkpoints and metrics.
      provenance: that of the runs, for the checkpoints.
      evaluate: what to measure every `train.eval_every` steps, before halving, and for early
        stopping.
      bar: `program.steps` are added to it. Its progress gets the phase "compiling": all until the
        first step of this process, and the first after halving, is done.
      tracker: gets the scalars of `metrics.jsonl` and `speed.jsonl`, too.
      begin: initial states on the host -> those to begin with, if there is no checkpoint yet.
      halving: the steps after which the runs that are behind stop.

    Returns:
      The state of each stack on the host: after the last step, or with early stopping the best one
      of each run.

    Raises:
      UserError: the loss of a single run stopped being finite, the checkpoints in `workdir` have
        another provenance, or one cannot be written.
    """
    with deferred() as stop, checkpoints.open_in(workdir, to_write=True) as saved:
        abstract = abstract_states(program.stacks)
        states, step = checkpoints.restore(saved, abstract, program.batches, provenance)
        bar.update(step)
        if step >= program.steps:
            return states
        outputs = outputs_of(program, train, halving)
        best = _best_states(program, train, saved, abstract, step)
        if best:
            outputs = outputs.without(best.stopped(step))
        with contextlib.ExitStack() as compiling:
            bar.progress.show(f"compiling the step, {_time_to_compile(program)}")
            _enter_compiling(compiling, bar)
            active = _first_runs(program, states, step, begin)
            outputs = outputs.without(outputs.ends.keys() - active.names)
            meter = SpeedMeter()
            calls = _Calls(active.program, meter)
            profiler = Profiler(workdir, train.profile)
            diverged = report_diverged(active.program, active.states, workdir, before=())
            stopping = False
            with (
                contextlib.closing(MetricsWriter(workdir, step, tracker)) as writer,
                contextlib.closing(profiler),
            ):
                while step < program.steps and not stopping:
                    running = outputs.runs_after(step)
                    training = running - diverged.keys()
                    if not training:
                        bar.update(program.steps - step)
                        break
                    wanted = min(outputs.next_stop(step) - step, profiler.most(step))
                    with profiler.call(step) as is_traced:
                        active.states, metrics, taken = calls.take(active.states, wanted)
                        if is_traced:
                            jax.block_until_ready(metrics)
                    compiling.close()  # after the first call
                    step += taken
                    bar.update(taken)
                    stopping = bool(_agreed(stop()))
                    due = outputs.due(step, stopping)
                    if due.save:
                        # A finite loss may have made parameters that are not finite.
                        active.states = mark_diverged(active.program, active.states)
                    # Check a state before it is saved: a run could not resume from a NaN.
                    if due.log or due.save:
                        diverged |= report_diverged(
                            active.program, active.states, workdir, diverged
                        )
                    scalars: dict[str, float] = {}
                    if due.log:
                        scalars |= _scalars(
                            active.program, active.states, metrics, training - diverged.keys()
                        )
                    # A copy may be one of whole tables.
                    with meter.spent_on("checkpoint"):
                        on_host = active.on_host() if due.save or due.evaluate else ()
                    with meter.spent_on("evaluation"):
                        evaluated = evaluate(on_host, running) if due.evaluate else None
                    leaving: Collection[str] = ()
                    if evaluated:
                        scalars |= evaluated.scalars
                        if due.halve:
                            leaving = evaluated.behind
                        if best:
                            best.update(step, evaluated.criteria, on_host)
                            outputs = outputs.without(best.stopped(step))
                            leaving = _worth_leaving(active.names, outputs.runs_after(step))
                    if scalars:
                        speed = calls.speed()
                        writer.write(step, scalars)
                        writer.write_speed(step, speed)
                        bar.set_postfix(_progress(program, scalars, speed, diverged))
                        meter.restart()
                    if leaving:
                        number, total = len(leaving), len(active.names)
                        _enter_compiling(compiling, bar)
                        active.stop(leaving, step)
                        outputs = outputs.without(leaving)
                        calls = _Calls(active.program, meter)
                        on_host = active.on_host()
                        bar.progress.show(
                            f"after {step:,} steps {number} of {total} runs have stopped; "
                            f"compiling the step of the others, {_time_to_compile(active.program)}"
                        )
                    # The last one is that of the results.
                    if due.save and not (best and step >= program.steps):
                        with meter.spent_on("checkpoint"):
                            checkpoints.save(
                                saved,
                                step,
                                on_host,
                                program.batches,
                                provenance,
                                best.saved() if best else None,
                            )
        # This process got no signal, so another one did.
        if stopping and not stop():
            raise UserError(
                f"another process ended this run after step {step}; start all of them again"
            )
        last_states = jax.tree.map(np.asarray, active.on_host())
        if not best or outputs.runs_after(step) - diverged.keys():
            return last_states
        # Under the step of complete runs, as no run trains on.
        states = best.results(last_states)
        checkpoints.save(saved, program.steps, states, program.batches, provenance)
        return states


def _best_states(
    program: Program,
    train: ConfigDict,
    saved: ocp.CheckpointManager,
    abstract: States,
    step: int,
) -> BestStates | None:
    """Return the best states so far, those of the checkpoint at `step`; None if all runs go on."""
    if not train.early_stopping:
        return None
    every, evaluations = train.early_stopping
    best = BestStates(program.stacks, every * evaluations)
    if step and (restored := checkpoints.restore_best(saved, step, abstract)):
        best.restore(*restored)
    return best


def _worth_leaving(active: Collection[str], left: Collection[str]) -> set[str]:
    """Return the active runs that are not left, if these are half of them or more.

    The others go on in a smaller program, which has to be compiled. Those that have stopped train
    on until then, for nothing.
    """
    stopped = {*active} - {*left}
    return stopped if left and 2 * len(stopped) >= len(active) else set()


def _enter_compiling(stack: contextlib.ExitStack, bar: Bar) -> None:
    """Count what follows as the phase "compiling" until the stack is closed."""
    stack.callback(bar.restart_clock)
    stack.enter_context(bar.progress.phase("compiling"))


def _time_to_compile(program: Program) -> str:
    """Say about how long a program takes to compile, if no cache has it."""
    return f"once: about {_SECONDS_TO_COMPILE * (1 + len(program.stacks))} s"


def _first_runs(program: Program, restored: States, step: int, begin: Begin | None) -> ActiveRuns:
    """Return the runs to continue with: restored, with the states of `begin`, or new."""
    if step:
        return ActiveRuns.resumed(program, restored)
    states = initial_states(program)
    if begin:
        states = program.devices.place(begin(states_on_host(program, states)))
    return ActiveRuns(program, states)


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    evaluate: bool
    halve: bool
    save: bool


class Outputs(NamedTuple):
    """The steps after which there is something to do; 0 in `…_every` means never."""

    log_every: int
    eval_every: int
    checkpoint_every: int
    ends: dict[str, int]  # the last step of each run, by its name
    halving: Sequence[int] = ()  # the steps after which runs that are behind stop
    stopping_every: int = 0  # steps from one evaluation for early stopping to the next

    def without(self, names: Collection[str]) -> "Outputs":
        """Leave out runs that have stopped."""
        return self._replace(
            ends={name: end for name, end in self.ends.items() if name not in names}
        )

    def runs_after(self, step: int) -> set[str]:
        """The runs that have steps left after `step`."""
        return {name for name, end in self.ends.items() if step < end}

    def next_stop(self, step: int) -> int:
        """The first later step with something to do, or that is the last of a run."""
        ends = [end for end in self.ends.values() if end > step]
        intervals = [self.log_every, self.eval_every, self.checkpoint_every, self.stopping_every]
        outputs = [(step // every + 1) * every for every in intervals if every]
        halving = [halved for halved in self.halving if halved > step]
        return min(ends + outputs + halving)

    def due(self, step: int, stopping: bool) -> Due:
        """What to do after a step; `stopping` if the process ends after it."""
        is_last = step == max(self.ends.values())
        # A run that has ended is complete, whatever becomes of longer ones.
        save = step in self.ends.values() or _is_multiple(step, self.checkpoint_every)
        halve = step in self.halving
        # The last states are measured in full after the training.
        evaluate = not is_last and (halve or _is_multiple(step, self.eval_every))
        if self.stopping_every:
            # But they may not be the best ones.
            evaluate |= step in self.ends.values() or _is_multiple(step, self.stopping_every)
        return Due(
            log=save or _is_multiple(step, self.log_every),
            evaluate=evaluate,
            halve=halve and not is_last,
            save=save or stopping,
        )


def outputs_of(program: Program, train: ConfigDict, halving: Sequence[int] = ()) -> Outputs:
    """Return the outputs of `config.train` and of halving for the runs of a program."""
    ends = by_run(program, [stack.hyperparameters.steps for stack in program.stacks])
    return Outputs(
        log_every=train.log_every,
        eval_every=train.eval_every,
        checkpoint_every=train.checkpoint_every,
        ends={name: int(end) for name, end in ends.items()},
        halving=halving,
        stopping_every=train.early_stopping[0] if train.early_stopping else 0,
    )


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Calls:
    """Calls of a program, each of as many steps as take at most `_LONGEST_CALL` seconds."""

    def __init__(self, program: Program, meter: SpeedMeter):
        self._program = program
        self._meter = meter
        self._most = 1  # steps of the next call
        self._sizes: tuple[int, int, float] | None = None  # for `SpeedMeter.scalars`

    def take(self, states: States, wanted: int) -> tuple[States, Sequence[StepMetrics], int]:
        """Take at most `wanted` steps; return the states, the last metrics, and their number."""
        start = time.monotonic()
        with self._meter.spent_on("data"):
            batches, span = self._program.batches.take(min(wanted, self._most))
        states, metrics = take_steps(self._program, states, batches, span)
        taken = span.stop - span.start
        if self._sizes is None:
            jax.block_until_ready(metrics)
            compiled = compiled_steps(self._program, states, batches, span)
            self._sizes = (*sizes_of(batches), flops_of(compiled))
            self._meter.restart()  # without the time of the compilation
        else:
            self._meter.add_steps(taken)
        if self._most < wanted:
            jax.block_until_ready(metrics)
            room = _LONGEST_CALL / _agreed(time.monotonic() - start)
            self._most = max(1, int(self._most * min(room, 2)))
        return states, metrics, taken

    def speed(self) -> dict[str, float]:
        """Return the scalars of `SpeedMeter` since its last restart."""
        return self._meter.scalars(*self._sizes) if self._sizes else {}


def _agreed(number: float) -> float:
    """Return the largest number of all processes, which have to take the same steps."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.process_allgather(np.float32(number)).max())


def scalar_name(scalar: str, run: str) -> str:
    """Return the name of a run's scalar in `metrics.jsonl`: `loss/<run>`, or `loss`."""
    return f"{scalar}/{run}" if run else scalar


def _scalars(
    program: Program, states: States, metrics: Sequence[StepMetrics], runs: Collection[str]
) -> dict[str, float]:
    """Return what the last step and the states say of some runs, as far as it is finite.

    The number of trained ids without a row, by table, is that of all runs.
    """
    scalars: dict[str, float] = {}
    for stack, state, of_step in zip(program.stacks, states, metrics, strict=True):
        of_runs = of_step | _transform_metrics(stack, state) | _learning_rates(stack, state)
        on_host = jax.device_get(program.devices.unreplicate(of_runs))
        for name, values in on_host.items():
            # Repeated runs follow the others.
            for run, value in zip(stack.names, values.tolist(), strict=False):
                if run in runs and math.isfinite(value):
                    scalars[scalar_name(name, run)] = value
    for tables in program.devices.unreplicate([state.unknown_ids for state in states]):
        for table, number in tables.items():
            name = f"unknown_ids/{table}"
            # A stack without a use for the teacher trains on fewer candidates of the same batches.
            scalars[name] = max(int(number), scalars.get(name, 0))
    return scalars


def _transform_metrics(stack: Stack, state: TrainState) -> StepMetrics:
    """Return the parameters of the mode itself, such as `scale/watch`; those of `shared`."""
    return {
        f"{name}/{task}": values[:, index]
        for name, values in state.transform.items()
        for index, task in enumerate(stack.tasks)
    }


def _learning_rates(stack: Stack, state: TrainState) -> StepMetrics:
    """Return the rates of the last step: `learning_rate/dense` and `learning_rate/tables`."""
    hyperparameters = stack.hyperparameters
    factor = stack.train_spec.schedule(state.step, hyperparameters.steps)
    return {
        "learning_rate/dense": factor * hyperparameters.optimizer.learning_rate,
        "learning_rate/tables": factor * hyperparameters.optimizer.table_learning_rate,
    }


def _progress(
    program: Program,
    scalars: dict[str, float],
    speed: dict[str, float],
    diverged: dict[str, int],
) -> str:
    """Return a short text for the end of the bar."""
    parts = []
    if program.stacks[0].names == ("",):
        if "loss" in scalars:
            parts.append(f"loss={scalars['loss']:.4f}")
    else:
        num_runs = sum(len(stack.names) for stack in program.stacks)
        parts.append(f"alive {num_runs - len(diverged)}/{num_runs}")
    if "speed/requests" in speed:
        parts.append(f"{speed['speed/requests']:,.0f} requests/s")
    return ", ".join(parts)
