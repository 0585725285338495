"""The last test on the real vLLM, because it ends it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.harness import Supervisor, events, session_pids
from tests.vllm.test_serving import CHAT, greedy

pytestmark = pytest.mark.vllm


@pytest.mark.stops_vllm
def test_sigterm_mid_stream_completes_it_and_leaves_nothing(served: Supervisor) -> None:
    workspace = Path(served.socket).parent
    segments = json.loads((workspace / "remains.json").read_text())["segments"]
    assert len(segments) >= 2
    session = served.client.get("/status").json()["pid"]  # not that of the first start
    assert len(session_pids(session)) >= 3  # API server, EngineCore, worker
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
    assert session_pids(session) == []
    assert not workspace.exists()
    assert not [path for path in segments if Path(path).exists()]
