"""Distillation losses: how far the student's logits are from the teacher's probabilities.

Each loss is a pure function

    loss(logits, probability, weight, temperature) -> (numerator, denominator)

of logits, probabilities and weights of shape [requests, candidates, tasks], which returns a
weighted sum and the sum of its weights, both of shape [tasks]. The two stay apart so that the step
can add them up over devices before it divides. An entry of weight 0 contributes exactly nothing, to
the loss and to its gradient, whatever stands there, NaN included.

To add a loss, write such a function and name it in `LOSSES`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Logits = Float[Array, "R N T"]
Totals = tuple[Float[Array, "T"], Float[Array, "T"]]
Loss = Callable[[Logits, Logits, Logits, Float[Array, ""]], Totals]

# Keeps the logit of a logged probability of exactly 0 or 1 finite when it is softened.
_PROBABILITY_FLOOR = 1e-6


def weighted_totals(values: Logits, weight: Logits) -> Totals:
    """The weighted sum of `values` a task, and the sum of the weights a task."""
    return jnp.sum(weight * values, axis=(0, 1)), jnp.sum(weight, axis=(0, 1))


def bce(
    logits: Logits, probability: Logits, weight: Logits, temperature: float | Float[Array, ""] = 1.0
) -> Totals:
    """Binary cross entropy against soft labels, in nats.

    With temperature τ both sides are softened and the loss is scaled so that its gradient keeps its
    size (Hinton, Vinyals and Dean, 2015, section 2.1):

        τ² · BCE(z / τ, σ(logit(p) / τ)),   BCE(z, p) = -p log σ(z) - (1 - p) log σ(-z)

    Args:
      logits: z, any real number.
      probability: p in [0, 1]; anything where the weight is 0.
      weight: ≥ 0.
      temperature: τ > 0; exactly 1 leaves p as it is.

    Returns:
      Weighted sum and sum of weights, each of shape [tasks].

    Example:
      At z = 0 every label costs log 2, and an entry of weight 0 costs nothing:

      >>> import jax.numpy as jnp
      >>> numerator, denominator = bce(
      ...     logits=jnp.zeros((1, 2, 1)),
      ...     probability=jnp.array([[[0.3], [jnp.nan]]]),
      ...     weight=jnp.array([[[2.0], [0.0]]]),
      ... )
      >>> float(numerator[0]) == 2 * float(jnp.log(2.0)), float(denominator[0])
      (True, 2.0)
    """
    # A product with 0 does not remove a NaN, so what must not count is replaced before use.
    known = jnp.where(weight > 0, probability, 0.5)
    clipped = jnp.clip(known, _PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    softened = jax.nn.sigmoid(jax.scipy.special.logit(clipped) / temperature)
    target = jnp.where(temperature == 1.0, known, softened)
    values = temperature**2 * optax.sigmoid_binary_cross_entropy(logits / temperature, target)
    return weighted_totals(values, weight)


LOSSES: dict[str, Loss] = {"bce": bce}
# Those that compare with probabilities; a log of positions (see `teacher_signal`) has none.
NEEDS_PROBABILITIES = frozenset({"bce"})
