"""The real vLLM under a real supervisor, started once for all tests here; the test that stops it runs last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness import DEMO, ROOT, Supervisor

VLLM = ROOT / ".vllm" / "bin" / "vllm"
START = 400.0  # seconds; 30 to 40 on an idle machine with two cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.xdist_group("vllm"))  # one process runs them all: there is one vLLM
            item.add_marker(pytest.mark.timeout(START + 200))
    items.sort(key=lambda item: item.get_closest_marker("stops_vllm") is not None)


@pytest.fixture(scope="session")
def served() -> Iterator[Supervisor]:
    assert VLLM.exists(), (
        "the real vLLM is missing: run scripts/setup, or leave these tests out with scripts/test --quick"
    )
    with Supervisor(DEMO, vllm=VLLM) as supervisor:
        supervisor.engine()
        yield supervisor.ready(START)


@pytest.fixture(scope="session")
def direct(served: Supervisor) -> Iterator[httpx.Client]:
    """vLLM's own socket, past the gateway."""
    transport = httpx.HTTPTransport(uds=served.socket)
    with httpx.Client(transport=transport, base_url="http://vllm", timeout=60) as client:
        yield client
