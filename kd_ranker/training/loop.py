"""The training loop: next batch, one step, and now and then a line, an evaluation, a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import grain
import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.errors import UserError
from kd_ranker.models.model import Parameters
from kd_ranker.training import checkpoints
from kd_ranker.training.mapping import Mapping
from kd_ranker.training.step import Frozen, Hyperparameters, Recipe, TrainState, make_step
from kd_ranker.training.workdir import MetricsWriter


def fit(
    recipe: Recipe,
    state: TrainState,
    batches: grain.IterDataset,
    hyperparameters: Hyperparameters,
    frozen: Frozen,
    mapping: Mapping,
    train: ConfigDict,
    workdir: Path,
    evaluate: Callable[[Parameters], dict[str, float]],
) -> TrainState:
    """Trains until `train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      recipe: what to train.
      state: the state to start from.
      batches: endless batches, on the devices already.
      hyperparameters: the run's numbers.
      frozen: what the step reads and does not change.
      mapping: how the step is spread over devices.
      train: `config.train` or `config.teacher.train`.
      workdir: gets checkpoints and metrics.
      evaluate: parameters -> scalars, called every `train.eval_every` steps.

    Returns:
      The state after the last step, on the host.

    Raises:
      UserError: the loss stopped being finite.
    """
    iterator = iter(batches)
    with checkpoints.open_manager(workdir) as manager:
        state, start = checkpoints.restore(manager, state, iterator)
        if start >= train.steps:
            return state
        writer = MetricsWriter(workdir, start)
        step = mapping.map_step(make_step(recipe))
        state, frozen = mapping.replicate(state), mapping.replicate(frozen)
        bar = tqdm(total=train.steps, initial=start, desc=workdir.name, unit="step", disable=None)
        for done in range(start + 1, train.steps + 1):
            state, losses = step(state, next(iterator), hyperparameters, frozen)
            bar.update()
            last = done == train.steps
            saves = last or done % train.checkpoint_every == 0
            scalars = {}
            # A state is looked at before it is saved: a run could not go on from a NaN.
            if saves or done % train.log_every == 0:
                scalars = {name: float(loss) for name, loss in mapping.unreplicate(losses).items()}
                _check_finite(scalars, done)
                bar.set_postfix(loss=f"{scalars['loss']:.4f}")
            if not last and train.eval_every and done % train.eval_every == 0:
                scalars |= evaluate(mapping.unreplicate(state).parameters)
            if scalars:
                writer.write(done, scalars)
            if saves:
                checkpoints.save(manager, done, mapping.unreplicate(state), iterator)
        bar.close()
        writer.close()
        manager.wait_until_finished()
    return jax.tree.map(np.asarray, mapping.unreplicate(state))


def _check_finite(scalars: dict[str, float], step: int) -> None:
    if not np.isfinite(scalars["loss"]):
        raise UserError(
            f"the loss is {scalars['loss']} at step {step}; try a smaller learning rate or weight"
        )
