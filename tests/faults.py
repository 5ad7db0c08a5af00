"""What is wrong, as people read it."""

from collections.abc import Callable
from typing import Any

import pytest

from kd_ranker.errors import UserError


def fault_of(command: Callable[..., Any], /, *arguments: Any, **options: Any) -> str:
    """The message of the `UserError` that a call raises, which has to be one line."""
    with pytest.raises(UserError) as caught:
        command(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
