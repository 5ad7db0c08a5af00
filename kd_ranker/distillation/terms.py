"""The terms of a distillation loss: each a loss, the signal that it learns from, and a weight.

Configs and `results.csv` hold the terms of a student as text. This module reads and writes it:

    softmax                           one term, on the final ranker's scores
    softmax + 0.5 * softmax:stage     the same, and one on stages that counts half as much
"""

import dataclasses
import math

import flax.struct
from jaxtyping import Array, Float

from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.teacher_signal import SCORES, SIGNALS
from kd_ranker.errors import UserError, check_choice

KEY = "distill.loss"
"""The config key whose text these terms are."""


@flax.struct.dataclass
class Term:
    """One term. It is a pytree with the weight as its only leaf, so that programs trace the weight.

    Attributes:
      loss: a name in `losses.LOSSES`.
      signal: a name in `teacher_signal.SIGNALS`.
      weight: at least 0; a float, or float32 [runs] for a stack of runs.
    """

    loss: str = flax.struct.field(pytree_node=False)
    signal: str = flax.struct.field(pytree_node=False, default=SCORES)
    weight: float | Float[Array, "*runs"] = 1.0

    @property
    def name(self) -> str:
        """The term in text, without its weight."""
        return self.loss if self.signal == SCORES else f"{self.loss}:{self.signal}"


def parse_terms(text: str) -> tuple[Term, ...]:
    """Read terms from text; their names need not exist, see `check_terms`.

    Raises:
      UserError: a weight is not a finite number of at least 0.

    >>> first, second = parse_terms("softmax + 0.5 * topk:stage")
    >>> second
    Term(loss='topk', signal='stage', weight=0.5)
    """
    return tuple(_parse_term(part.strip(), text) for part in text.split("+"))


def _parse_term(part: str, text: str) -> Term:
    weight = 1.0
    if "*" in part:
        number, _, part = part.partition("*")
        weight = _parse_weight(number.strip(), text)
    loss, colon, signal = part.strip().partition(":")
    return Term(loss, signal if colon else SCORES, weight)


def _parse_weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(
            f"{KEY}={text!r}: the weight {number!r} is not a number of at least 0; write terms "
            "like 'softmax + 0.5 * softmax:stage'"
        )
    return weight


def check_terms(text: str) -> None:
    """Raise UserError unless `parse_terms` reads the text and its losses and signals exist."""
    for term in parse_terms(text):
        check_choice(f"{KEY}={text!r}: loss", term.loss, LOSSES)
        check_choice(f"{KEY}={text!r}: signal", term.signal, SIGNALS)


def format_terms(terms: tuple[Term, ...]) -> str:
    """Write terms as the shortest text that `parse_terms` reads back.

    >>> format_terms((Term("softmax"), Term("softmax", "stage", 0.5)))
    'softmax + 0.5 * softmax:stage'
    """
    return " + ".join(map(_format_term, terms))


def _format_term(term: Term) -> str:
    if term.weight == 1:
        return term.name
    # The shortest digits that are read back, as 3 and 1e16: a + would separate terms.
    weight = repr(float(term.weight)).removesuffix(".0").replace("e+", "e")
    return f"{weight} * {term.name}"


def without_weights(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Return the same terms, each with weight 1: what runs of one method have in common."""
    return tuple(dataclasses.replace(term, weight=1.0) for term in terms)
