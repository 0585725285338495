"""Planted secrets, in every place where people put them, looked for in everything that comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.engine.conftest import Call
from tests.harness import FAKE, Supervisor, http

# By what they look like, or by the name that they stand beside. All are longer than six characters.
PLANTED = {
    "hf_plantedtoken1": "HF_TOKEN",
    "planted-key-two": "SUPERVISOR_API_KEYS",
    "planted-key-three": "SUPERVISOR_API_KEYS",
    "sk-planted4444444": "OPENAI_API_KEY",
    "planted-password-5": "a URL in OTLP_TRACES_ENDPOINT",
    "planted-aws-secret-6": "JSON in MODEL_LOADER_EXTRA_CONFIG",
    "planted-query-token-7": "a URL's query in HF_OVERRIDES",
    "planted-bearer-8": "a header in JSON",
    "planted-in-yaml-9": "config.yaml",
    "hf_plantedraw10": "behind --",
    "planted-vllm-key-11": "VLLM_API_KEY",
    "planted'quote\\12": "a password that must be escaped in JSON and in a shell",
    "rpa_planted131313": "RUNPOD_API_KEY",
    "planted-admin-key-14": "SUPERVISOR_ADMIN_KEYS",
    "planted-part-15": "a part of JSON behind --",
    "planted-part-16": "a part of JSON in SUPERVISOR_EXTRA_ARGS",
    "planted-auth-17": "auth in JSON",
}
ENVIRON = {
    "HF_TOKEN": "hf_plantedtoken1",
    "SUPERVISOR_API_KEYS": "planted-key-two, planted-key-three",
    "SUPERVISOR_ADMIN_KEYS": "planted-admin-key-14",
    "VLLM_API_KEY": "planted-vllm-key-11",
    "OPENAI_API_KEY": "sk-planted4444444",
    "OTLP_TRACES_ENDPOINT": "http://user:planted-password-5@127.0.0.1/",
    "MODEL_LOADER_EXTRA_CONFIG": json.dumps({"aws_secret_access_key": "planted-aws-secret-6", "concurrency": 4}),
    "HF_OVERRIDES": json.dumps({"url": "https://127.0.0.1/m?x=1&token=planted-query-token-7"}),
    "ADDITIONAL_CONFIG": json.dumps({"headers": {"Authorization": "Bearer planted-bearer-8"}}),
    "SOME_PASSWORD": "planted'quote\\12",
    "TOOL_SERVER": "planted'quote\\12",
    "RUNPOD_API_KEY": "rpa_planted131313",
    "SUPERVISOR_EXTRA_ARGS": "--ec-transfer-config.ec_connector_extra_config.password planted-part-16",
    "DIFFUSION_CONFIG": json.dumps({"auth": "planted-auth-17"}),
}
CONFIG = "supervisor:\nkv_transfer_config: {kv_connector: x, kv_connector_extra_config: {api_key: planted-in-yaml-9}}\n"
RAW = ("--", "--revision", "hf_plantedraw10", "--watermark-config.s3_secret", "planted-part-15")


def leaks(text: str) -> list[str]:
    shapes = {secret: {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]} for secret in PLANTED}
    return [f"{secret} ({PLANTED[secret]})" for secret, found in shapes.items() if any(form in text for form in found)]


@pytest.mark.parametrize(
    "arguments",
    [("explain", "m"), ("explain", "m", "--json"), ("explain", "m", "--port", "bad"), ("up", "m", "--port", "bad")],
    ids=" ".join,
)
def test_explain_and_problems_show_no_secret(call: Call, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    done = call(*arguments, *RAW, cwd=tmp_path, SUPERVISOR_VLLM=str(FAKE), **ENVIRON)
    assert done.returncode == (2 if "bad" in arguments else 0), done.stderr
    assert "****" in done.stdout or "bad" in arguments
    assert leaks(done.stdout + done.stderr) == []


def test_wrong_values_that_hold_secrets_are_told_without_them(call: Call, tmp_path: Path) -> None:
    wrong = {name: f"{{{value}" for name, value in ENVIRON.items() if value.startswith("{")}
    wrong |= {
        "MAX_NUM_SEQS": "hf_plantedtoken1",
        "DTYPE": "planted-key-two",
        "SEED": "x" * 195 + "planted-key-three",  # where long values are cut
        "LOGGING_CONFIG": "http://u:planted-password-5@h/",
        "MAX_LOGPROBS": "planted'quote\\12",
        "SUPERVISOR_API_KEYS_": "planted-key-two",
        "SUPERVISOR_EXTRA_ARGS": "--hf-token hf_plantedraw10 --api-key planted-in-yaml-9 --seed sk-planted4444444",
    }
    done = call("explain", "m", cwd=tmp_path, SUPERVISOR_VLLM=str(FAKE), **(ENVIRON | wrong))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) >= len(wrong)
    assert leaks(done.stdout + done.stderr) == []


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_running_supervisor_shows_no_secret(tmp_path: Path, form: str) -> None:
    """Its log with vLLM's lines in it, /status, a wrong key's answer, and a failure's report."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    # vLLM logs its arguments, and may log what it was given to talk to: the fake does as it is told, and dies of it.
    said = "Initializing with " + " ".join(ENVIRON.values()) + " for {'api_key': 'planted-in-yaml-9'} hf_plantedraw10"
    plan = [{"die_at_start": {"log": [said], "code": 1}}]
    environ = ENVIRON | {
        "SUPERVISOR_LOG_FORMAT": form,
        "SUPERVISOR_ON_FAILURE": "serve",
        "SUPERVISOR_MAX_RESTARTS": "0",
    }
    key = {"X-API-Key": "planted-admin-key-14"}
    with Supervisor("m", *RAW, vllm=FAKE, plan=plan, cwd=tmp_path, environ=environ) as supervisor:
        supervisor.says("-> failed")
        supervisor.says("Initializing with ")
        url = f"http://127.0.0.1:{re.search(r'http://127.0.0.1:([0-9]+)', supervisor.output)[1]}"  # type: ignore[index]
        seen = [http.get(f"{url}/status?after=0", headers=key).text]
        seen.append(http.get(f"{url}/status", headers={"X-API-Key": "sk-planted4444444"}).text)
        seen.append(http.get(f"{url}/v1/models?token=planted-query-token-7", headers=key).text)
        assert "Initializing with" in seen[0]
        assert '"settings"' in seen[0]
        assert '"log"' in seen[0]
        assert leaks("".join(seen)) == []
        assert leaks(supervisor.output) == []
