"""Take the step in which a run stopped being finite again, and look at what it computed."""

import dataclasses
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.batch import Items
from kd_ranker.cohorts.plan import open_sweep
from kd_ranker.errors import UserError
from kd_ranker.pipeline.remote import fetched, place_of
from kd_ranker.pipeline.trained import config_of
from kd_ranker.pipeline.trainees import open_trainees
from kd_ranker.training import kept_steps
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.non_finite import (
    StepInputs,
    compute_step,
    first_non_finite,
    quantities_of,
)
from kd_ranker.training.specs import Stack
from kd_ranker.training.state import select_run


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step that was taken once more.

    Attributes:
      inputs: what the run computed the step from: batch, rows, parameters.
      quantities: what it read and computed, in that order; NumPy arrays by name.
      first: the first of them with an entry that is not finite, and its place; "" if all are.
      error: raised by JAX at the first operation with a result that is NaN, even if a mask
        discards it; None if no result is. `pdb.post_mortem(replay.error.__traceback__)` shows the
        values there.
    """

    inputs: StepInputs
    quantities: dict[str, np.ndarray]
    first: str
    error: FloatingPointError | None

    def __str__(self) -> str:
        lines = [f"first not finite: {self.first or 'nothing'}"]
        if self.error:
            lines.append(f"first NaN of an operation: {self.error}, {_line_of(self.error)}")
        return "\n".join(lines)


def _line_of(error: FloatingPointError) -> str:
    """Return the last line of the traceback outside of JAX."""
    frames = traceback.extract_tb(error.__traceback__)
    of_jax = Path(jax.__file__).parent
    frame = [frame for frame in frames if of_jax not in Path(frame.filename).parents][-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


def replay(
    workdir: str | Path, step: int | None = None, run: str = "", trust: bool = False
) -> Replay:
    """Take again, without jit, a step that is kept in `nan/` of a workdir.

    It runs on one device, operation by operation, under `jax.debug_nans`.

    Args:
      workdir: a workdir of `train`, `train_teacher` or `sweep`; its dataset has to be in place.
      step: the step at which the run stopped being finite; None if it keeps only one.
      run: the name of the run in a sweep; "" if only one stopped there.
      trust: whether the config file that registered a loss or the like may be executed.

    Raises:
      UserError: no such step or run is kept; the message names those that are.
    """
    with fetched(place_of(str(workdir)), with_checkpoints=False) as folder:
        kept = _find(folder, step, run, trust)
        inputs = kept_steps.read(kept.folder, kept.step, kept.run, kept.stack)
    return take_again(kept.stack, kept.run, inputs, kept.items)


def take_again(stack: Stack, run: str, inputs: StepInputs, items: Items) -> Replay:
    """Take a step of a run of a stack once more, see `replay`."""
    hyperparameters = select_run(stack.hyperparameters, stack.names.index(run))
    inputs_on_device, items_on_device = jax.tree.map(jnp.asarray, (inputs, items))
    arguments = (stack.train_spec, hyperparameters, inputs_on_device, items_on_device)
    error = None
    with jax.disable_jit():
        try:
            with jax.debug_nans(True):
                computed = compute_step(*arguments)
        except FloatingPointError as raised:
            error = raised
            computed = compute_step(*arguments)
    quantities = list(quantities_of(*arguments, jax.device_get(computed)))
    found = first_non_finite(iter(quantities), stack.tasks)
    values = {quantity.name: np.asarray(quantity.values) for quantity in quantities}
    return Replay(inputs, values, found.quantity if found else "", error)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A kept step of a run."""

    folder: Path  # with `nan/`
    step: int
    run: str
    stack: Stack
    items: Items


def _find(workdir: Path, step: int | None, run: str, trust: bool) -> _Kept:
    config = config_of(workdir, trust=trust)
    command = workdirs.read_environment(workdir).get("command")
    trainees = open_trainees(config, {"": config} if command == "train" else None)
    workdirs.check_dataset(workdir, trainees.dataset.provenance)
    of_folders = {workdir: trainees}
    if command == "sweep":
        sweep = open_sweep(config, workdir, trainees.dataset.provenance)
        of_folders = {
            folder: trainees.of(runs)
            for folder, runs in zip(sweep.folders, sweep.cohorts, strict=True)
        }
    kept = [
        (folder, number, name)
        for folder in of_folders
        for number in kept_steps.steps_in(folder)
        for name in kept_steps.findings_in(folder, number)
    ]
    asked = [
        (folder, number, name)
        for folder, number, name in kept
        if step in (None, number) and run in ("", name)
    ]
    if not kept:
        raise UserError(
            f"{workdir} keeps no step: none of its runs stopped being finite; name the workdir of "
            "a run that did"
        )
    if len(asked) != 1:
        known = [f"step {number}" + (f" of {name}" if name else "") for _, number, name in kept]
        raise UserError(
            f"{len(asked)} steps that {workdir} keeps match; name one of: {'; '.join(known)}"
        )
    ((folder, number, name),) = asked
    stack = next(stack for stack in of_folders[folder].stacks if name in stack.names)
    return _Kept(folder, number, name, stack, trainees.dataset.items)
