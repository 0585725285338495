"""The last test on the real vLLM, because it ends it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.harness import Supervisor, events, session_of
from tests.vllm.test_serving import CHAT, greedy


@pytest.mark.stops_vllm
def test_sigterm_mid_stream_completes_it_and_leaves_nothing(served: Supervisor) -> None:
    workspace = Path(served.socket).parent
    assert len(session_of(served.engine())) >= 3  # API server, EngineCore, worker
    body = greedy(stream=True, max_tokens=1500, ignore_eos=True)
    with served.client.stream("POST", CHAT, json=body) as answer:
        received = b""
        for data in answer.iter_raw():
            if not received:
                served.signal(signal.SIGTERM)
                served.says("ready -> draining")
            received += data
    assert received.endswith(b"data: [DONE]\n\n")
    last = list(events(received))[-1]
    assert last["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
    assert served.exit_code(60) == 0
    assert session_of(served.engine()) == []
    assert not workspace.exists()
