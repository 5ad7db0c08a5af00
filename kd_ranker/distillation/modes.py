"""Modes: the ways in which a student learns from the two kinds of labels.

A mode fixes the number of heads per task. It selects the logits for the loss on user labels and
those for the loss on the teacher's probabilities. It also defines the probabilities that a served
student may rank by. With student logits z of shape [requests, candidates, heads] and T tasks:

    none     T heads;   user labels see z;        no teacher
    aux     2T heads;   user labels see z[:T];    teacher probabilities see z[T:]
    shared   T heads;   user labels see z;        teacher probabilities see scale ⊙ z + offset

To add a mode, write its functions and name it in `MODES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logits = Float[Array, "R N heads"]
Transform = dict[str, Float[Array, "T"]]  # the mode's own parameters; empty if it has none
ToLogits = Callable[[Logits, Transform], Float[Array, "R N T"]]
ToProbability = Callable[[Logits], Float[Array, "R N T"]]


class Mode(NamedTuple):
    """One way to learn from the labels.

    Attributes:
      heads_per_task: the student has this many heads times the number of tasks.
      init_transform: (number of tasks, whether the config enables an affine transform) -> the
        mode's own parameters.
      user_logits: (z, transform) -> the logits that user labels see.
      teacher_logits: (z, transform) -> the logits that teacher probabilities see; None if the mode
        does not use a teacher.
      serve: name -> function from z to the probabilities to rank by; the first is the default.
    """

    heads_per_task: int
    init_transform: Callable[[int, bool], Transform]
    user_logits: ToLogits
    teacher_logits: ToLogits | None
    serve: dict[str, ToProbability]


def _affine_transform(tasks: int, affine: bool) -> Transform:
    if not affine:
        return {}
    return {"scale": jnp.ones(tasks), "offset": jnp.zeros(tasks)}


def _all_heads(logits: Logits, _: Transform) -> Float[Array, "R N T"]:
    return logits


def _user_heads(logits: Logits, _: Transform | None = None) -> Float[Array, "R N T"]:
    return logits[..., : logits.shape[-1] // 2]


def _teacher_heads(logits: Logits, _: Transform | None = None) -> Float[Array, "R N T"]:
    return logits[..., logits.shape[-1] // 2 :]


def _transformed(logits: Logits, transform: Transform) -> Float[Array, "R N T"]:
    if not transform:
        return logits
    return transform["scale"] * logits + transform["offset"]


def _blend(logits: Logits) -> Float[Array, "R N T"]:
    """Return the mean probability of the user and teacher heads."""
    user = jax.nn.sigmoid(_user_heads(logits))
    teacher = jax.nn.sigmoid(_teacher_heads(logits))
    return (user + teacher) / 2


MODES: dict[str, Mode] = {
    "none": Mode(
        heads_per_task=1,
        init_transform=lambda tasks, affine: {},
        user_logits=_all_heads,
        teacher_logits=None,
        serve={"user": jax.nn.sigmoid},
    ),
    "aux": Mode(
        heads_per_task=2,
        init_transform=lambda tasks, affine: {},
        user_logits=_user_heads,
        teacher_logits=_teacher_heads,
        serve={
            "user": lambda logits: jax.nn.sigmoid(_user_heads(logits)),
            "teacher": lambda logits: jax.nn.sigmoid(_teacher_heads(logits)),
            "blend": _blend,
        },
    ),
    "shared": Mode(
        heads_per_task=1,
        init_transform=_affine_transform,
        user_logits=_all_heads,
        teacher_logits=_transformed,
        serve={"user": jax.nn.sigmoid},
    ),
}
