"""Few draws of the requests: what a report does with them does not depend on their number."""

from collections.abc import Iterator

import pytest

from kd_ranker.report import estimates


@pytest.fixture(scope="session", autouse=True)
def few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(estimates, "DRAWS", 60)
        yield
