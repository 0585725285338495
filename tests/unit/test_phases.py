"""Phases, diagnosis and policy: small pure pieces."""

from __future__ import annotations

import time

import pytest

from supervisor.engine.diagnosis import last_error
from supervisor.engine.phases import PHASES, Waterfall
from supervisor.engine.process import how_it_ended

# vLLM 0.32's own lines, cut to what matters.
LOG = """\
(APIServer pid=9946) INFO 11-21 19:33:40 [api_utils.py:286] non-default args: {'model_tag': 'demo'}
(EngineCore pid=10595) INFO 11-21 19:34:30 [core.py:112] Initializing a V1 LLM engine (v0.32.0) with config
(Worker pid=10817) INFO 11-21 19:34:53 [cpu_model_runner.py:68] Starting to load model supervisor/demo/model...
Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]
(Worker pid=10817) INFO 11-21 19:34:53 [default_loader.py:501] Loading weights took 0.03 seconds
(EngineCore pid=10595) INFO 11-21 19:34:55 [kv_cache_utils.py:2327] CPU KV cache size: 1,048,576 tokens
(EngineCore pid=10595) INFO 11-21 19:35:01 [core.py:402] init engine (profile, kv cache, warmup) took 6.20 s
(Worker pid=10818) INFO 11-21 19:35:01 [cpu_model_runner.py:68] Starting to load model (a second rank, late)
(APIServer pid=9946) INFO 11-21 19:35:03 [entry.py:140] Starting vLLM server on unix:/tmp/vllm.sock
"""


def test_phases_of_a_real_start_only_go_forward() -> None:
    waterfall = Waterfall(time.monotonic())
    assert waterfall.current == "importing vLLM"
    begun = [phase for line in LOG.splitlines() if (phase := waterfall.hear(line))]
    assert begun == [
        "reading the model's config",
        "starting the engine core",
        "loading weights",
        "profiling memory",
        "starting the API server",
    ]
    waterfall.finish()
    assert waterfall.hear("Loading model weights") is None
    rows = waterfall.as_rows()
    assert [row["name"] for row in rows] == ["importing vLLM", *begun]
    assert all(isinstance(row["seconds"], float) and row["seconds"] >= 0 for row in rows)


def test_phase_names_are_unique() -> None:
    assert len({name for name, _ in PHASES}) == len(PHASES)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["(EngineCore pid=1) ERROR 11-21 19:00:00 [core.py:1] ValueError: too large"], "ValueError: too large"),
        (["  File x", "RuntimeError: something else"], "RuntimeError: something else"),
        (["vllm serve: error: unrecognized arguments: --nope"], "vllm serve: error: unrecognized arguments: --nope"),
        (["(Worker pid=3) WARNING 11-21 19:34:54 [utils.py:597] fallback. Exception: no primitive"], None),
        (["INFO:     Application startup complete."], None),
    ],
)  # fmt: skip
def test_last_error(lines: list[str], expected: str | None) -> None:
    assert last_error(lines) == expected


def test_how_it_ended() -> None:
    assert how_it_ended(1) == "exit code 1"
    assert how_it_ended(-9) == "killed by SIGKILL"
    assert how_it_ended(-40) == "killed by signal 40"
