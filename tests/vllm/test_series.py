"""The list of vLLM's series that the alert rules and the dashboard are checked by (tests/deploy/test_prometheus.py)."""

from __future__ import annotations

import pytest

from tests.deploy.test_prometheus import VLLMS, known
from tests.harness import Supervisor

pytestmark = pytest.mark.vllm


def test_the_listed_series_are_vllms(served: Supervisor) -> None:
    told = set(known(served.client.get("/metrics").text))
    assert VLLMS - told == set()
