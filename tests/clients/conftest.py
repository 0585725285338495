from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.programs import Clients


@pytest.fixture(scope="session")
def clients() -> Iterator[Clients]:
    """The clients' programs, which are stopped after the last test."""
    clients = Clients()
    yield clients
    clients.stop()
