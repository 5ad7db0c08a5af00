"""Few draws of the requests: what a report does with them does not depend on their number."""

from collections.abc import Iterator

import pytest

from kd_ranker.reporting import estimates as module
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.study import read_studies
from tests.reporting import sweeps


@pytest.fixture(scope="session", autouse=True)
def few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "DRAWS", 60)
        yield


@pytest.fixture(scope="session")
def estimates(tmp_path_factory: pytest.TempPathFactory) -> Estimates:
    """The estimates of a whole sweep of three modes and three seeds; no test changes them."""
    (study,) = read_studies([sweeps.write_sweep(tmp_path_factory.mktemp("sweep"))])
    return Estimates(study)
