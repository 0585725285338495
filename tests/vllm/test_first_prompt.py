"""The first thing that a user asks the demo model may be one letter."""

from __future__ import annotations

import pytest

from tests.harness import DEMO, Supervisor
from tests.vllm.conftest import START, VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.breaks_vllm]  # it starts another


def test_a_first_prompt_of_one_token_is_answered() -> None:
    """On CPUs with AMX it killed vLLM, and the next vLLM as well, to which it was sent again."""
    with Supervisor(DEMO, vllm=VLLM, environ={"MAX_NUM_SEQS": "4"}) as supervisor:
        supervisor.engine()
        supervisor.ready(START)
        answer = supervisor.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
        assert supervisor.client.get("/status").json()["restarts"] == 0
