"""The real vLLM under a real supervisor, started once for all tests here.

Tests that break it run after the others, then the one that stops it, and after that the one that needs the machine for
two of it. tests/conftest.py names the files that run meanwhile, in another process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness import ROOT, Supervisor
from tests.queue.conftest import RunPod

VLLM = ROOT / ".vllm" / "bin" / "vllm"
START = 400.0  # seconds; 30 to 40 on an idle machine with two cores
LAST = "test_two_ranks.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests in this order, and gives each the time that a start of vLLM may take."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(START + 200))
    order = ("breaks_vllm", "stops_vllm")
    items.sort(
        key=lambda item: [
            item.path.name == LAST,
            *(item.get_closest_marker(name) is not None for name in reversed(order)),
        ]
    )


@pytest.fixture(scope="session")
def simulated() -> Iterator[RunPod]:
    """The fake RunPod that the shared supervisor belongs to; it may have no worker yet (`runpod` has one)."""
    with RunPod() as found:
        yield found


@pytest.fixture(scope="session")
def served(simulated: RunPod) -> Iterator[Supervisor]:
    """The supervisor that the tests share, in queue mode and with a port: HTTP and jobs go to the same vLLM."""
    assert VLLM.exists(), (
        "the real vLLM is missing: run scripts/setup, or leave these tests out with scripts/test --quick"
    )
    # Every crash counts as the first, and a hang as one after 15 s: tests/vllm/test_faults.py breaks it often.
    environ = {
        "SUPERVISOR_MAX_RESTARTS": "100",
        "SUPERVISOR_RESTART_WINDOW": "0.05",
        "SUPERVISOR_STALL_TIMEOUT": "15",
        "SUPERVISOR_HOLD_TIMEOUT": str(START),
        "SUPERVISOR_DRAIN_TIMEOUT": "90",  # a long stream on a busy machine
        **simulated.environment(),
    }
    # It is started as a newcomer does: without a word on the model or on where vLLM is.
    with Supervisor(vllm=None, program=(ROOT / "scripts" / "up",), environ=environ) as supervisor:
        supervisor.engine()
        yield supervisor.ready(START)


def link_to(served: Supervisor, folder: Path) -> Path:
    """Returns a `vllm` for a second supervisor, which is there at once: its socket is a link to that of `served`."""
    vllm = folder / "vllm"
    vllm.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo 0.32.0; exit; fi\n'
        'while [ "$1" != --uds ]; do shift; done\n'
        f'ln -s {served.socket} "$2"\n'
        "exec sleep 10000\n"
    )  # fmt: skip
    vllm.chmod(0o755)
    return vllm


@pytest.fixture(scope="session")
def runpod(simulated: RunPod, served: Supervisor) -> RunPod:
    """The fake RunPod, with a worker: it starts the shared supervisor even for a test that runs by itself."""
    return simulated


@pytest.fixture(scope="session")
def direct(served: Supervisor) -> Iterator[httpx.Client]:
    """A client on vLLM's own socket, past the gateway."""
    transport = httpx.HTTPTransport(uds=served.socket)
    with httpx.Client(transport=transport, base_url="http://vllm", timeout=60) as client:
        yield client
