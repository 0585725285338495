from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import Supervisor


@pytest.fixture(scope="session")
def running() -> Iterator[Supervisor]:
    """One supervisor over the fake, for tests that leave it as they found it."""
    with Supervisor("some/model") as supervisor:
        yield supervisor.ready()
