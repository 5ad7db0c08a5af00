"""Adam's constants (Kingma and Ba, 2015), the same for embedding rows and dense parameters."""

from typing import NamedTuple


class Adam(NamedTuple):
    """The constants, under the names that optax gives them."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


ADAM = Adam()
