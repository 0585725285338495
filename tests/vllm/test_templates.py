"""worker-vllm's and runpod-LLM's templates, as RunPod injects them, on the real vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import DEMO, ROOT, Supervisor
from tests.vllm.conftest import START, VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.breaks_vllm]  # it starts others: not while the tests count on the first

# What a CPU takes half a minute for.
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}
TEMPLATES = json.loads((ROOT / "tests/unit/templates.json").read_text())


@pytest.mark.parametrize(
    ("template", "model", "changed"),
    [
        # A GPU has blocks of worker-vllm's 16 tokens, the CPU build multiples of 32 only.
        ("worker-vllm template", "MODEL_NAME", {"BLOCK_SIZE": "32"} | UNCOMPILED),
        ("runpod-LLM template", "LLM_MODEL", {"MAX_MODEL_LEN": "2048"}),  # the demo model is made for no more
    ],
)
def test_the_template_serves(tmp_path: Path, template: str, model: str, changed: dict[str, str]) -> None:
    injected = TEMPLATES[template] | {model: str(DEMO)} | changed
    # Ours below the template's: what a machine without a GPU needs.
    environ = {"SUPERVISOR_MODE": "http", "VLLM_CPU_KVCACHE_SPACE": "1", "MAX_NUM_SEQS": "4"} | injected
    with Supervisor(vllm=VLLM, cwd=tmp_path, environ=environ) as supervisor:
        supervisor.engine()
        supervisor.ready(START)
        answer = supervisor.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        )
        assert answer.status_code == 200, answer.text
        status = supervisor.client.get("/status").json()
        settings = {row["name"]: row for row in status["settings"]}
        assert settings["MODEL"]["source"] == f"environment {model}"
        assert settings["GPU_MEMORY_UTILIZATION"]["value"] == TEMPLATES[template]["GPU_MEMORY_UTILIZATION"]
        for warning in status["warnings"]:
            assert warning in supervisor.output
