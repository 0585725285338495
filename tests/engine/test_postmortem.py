"""The post-mortem: a bundle in the cache folder and a block in the log, for each crash and for the end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.around import postmortem
from supervisor.around.machine import Machine
from supervisor.around.postmortem import MAX_BUNDLES, PostMortem, format_block
from supervisor.secrets import Mask
from tests.harness import Supervisor, session_pids

SECRETS = {
    "HF_TOKEN": "hf_plantedtoken1",
    "SUPERVISOR_API_KEYS": "planted-key-two",
    "SOME_PASSWORD": "planted-password-3",
    "HF_OVERRIDES": json.dumps({"url": "https://127.0.0.1/m?token=planted-query-token-4"}),
}
LOG = ["INFO nothing yet", "ValueError: planted-password-3 is not a model, token hf_plantedtoken1"]


def bundles(folder: Path) -> list[Path]:
    return sorted((folder / "postmortem").glob("*"))


@pytest.mark.slow
def test_a_crash_leaves_a_bundle_and_a_block_without_secrets(tmp_path: Path) -> None:
    environ = {"SUPERVISOR_CACHE_DIR": str(tmp_path), **SECRETS}
    with Supervisor("m", "--", "--max-num-seqs", "7", environ=environ) as supervisor:
        supervisor.ready()
        supervisor.client.headers["Authorization"] = "Bearer planted-key-two"
        supervisor.engine()
        os.kill(supervisor.engine(), signal.SIGKILL)
        supervisor.says(r"  bundle: +\S+\.json\n")
        supervisor.says(r"(?s)restarting -> starting.*starting -> ready")
        supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]
        said = supervisor.output
    (path,) = bundles(tmp_path)
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "planted" not in text
    content = json.loads(text)
    assert content["signal"] == signal.SIGKILL
    assert content["cause"]  # by its exit, or by EngineCore's, which goes with it: whichever is seen first
    assert [row["state"] for row in content["timeline"]][:3] == ["starting", "ready", "restarting"]
    assert all(row["seconds"] >= 0 for row in content["phases"])
    assert content["phases"]
    assert "--max-num-seqs 7" in content["command"]
    assert content["versions"]["vllm"] == "0.32.0"
    assert content["memory"]["total"] > 0
    assert content["disks"][0]["free"] > 0
    assert 0 < len(content["log"]) <= 500
    assert {"name": "HF_OVERRIDES"}.items() <= next(
        r for r in content["settings"] if r["name"] == "HF_OVERRIDES"
    ).items()

    shown = said[said.index("post-mortem, to be pasted") :]
    shown = shown[: re.search(r"  bundle: .*\n", shown).end()]  # type: ignore[union-attr]
    assert 10 <= len(shown.splitlines()) <= 20
    assert str(path) in shown
    assert "planted" not in shown
    assert "signal 9" in shown


@pytest.mark.slow
def test_only_the_last_few_stay(tmp_path: Path) -> None:
    environ = {"SUPERVISOR_CACHE_DIR": str(tmp_path), "SUPERVISOR_MAX_RESTARTS": "9"}
    (tmp_path / "postmortem").mkdir()
    old = [tmp_path / "postmortem" / f"20200101-00000{n}-000-1.json" for n in range(MAX_BUNDLES)]
    for path in old:
        path.write_text("{}")
    with Supervisor("m", environ=environ) as supervisor:
        supervisor.ready()
        os.kill(supervisor.engine(), signal.SIGKILL)
        supervisor.says("bundle: ")
        supervisor.says(r"(?s)restarting -> starting.*starting -> ready")
        supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]
    left = bundles(tmp_path)
    assert len(left) == MAX_BUNDLES
    assert left[:-1] == old[1:]


@pytest.mark.slow
def test_a_full_disk_costs_a_line_and_no_request(tmp_path: Path) -> None:
    """No file can grow by a byte (`ulimit -f 0`): post-mortem, notes and caches are lost, the requests are not."""
    full = ("bash", "-c", 'ulimit -f 0; exec "$@"', "bash")
    environ = {"HOME": str(tmp_path), "SUPERVISOR_CACHE_DIR": str(tmp_path)}
    with Supervisor("m", within=full, environ=environ) as supervisor:
        supervisor.ready()
        os.kill(supervisor.engine(), signal.SIGKILL)
        assert supervisor.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        supervisor.says(rf"  bundle: +could not be written to {tmp_path}/postmortem \(.+\)\n")
        supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code() == 0
        assert session_pids(supervisor.engine()) == []
        assert "Traceback" not in supervisor.output
    assert [path for path in bundles(tmp_path) if path.stat().st_size == 0] == []


def test_a_folder_that_can_not_be_written_costs_a_line() -> None:
    assert re.search(
        r"\n  bundle: +could not be written to /proc/nowhere/postmortem \(.+\)$",
        mortem(Path("/proc/nowhere")).report(failure()),
    )


def failure(**more: Any) -> dict[str, Any]:
    return {"at": 0.0, "cause": "It ended.", "remedy": "", "exit_code": 1, "signal": None, "restarts": 0, "phases": [],
            "verdict": "restart 1 of 5", "timeline": [], "log": [], "argv": ("vllm", "serve"), **more}  # fmt: skip


def mortem(folder: Path, **environ: str) -> PostMortem:
    facts = {"model": "m", "settings": [{"name": "MODEL", "value": "m", "source": "command line", "overrode": []}]}
    account: Any = SimpleNamespace(status=dict, last_failure=None, timeline=())
    return PostMortem(
        folder, mask=Mask(environ), vllm_version="0.32.0", facts=facts, account=account, machine=Machine(folder)
    )


def test_out_of_memory_kills_and_limits_are_told(tmp_path: Path) -> None:
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    for name, text in {"cgroup.controllers": "", "memory.max": "8000000000", "memory.current": "7000000000",
                       "memory.events": "low 0\noom 3\noom_kill 2\n"}.items():  # fmt: skip
        (cgroup / name).write_text(text)
    found = mortem(tmp_path).gather(failure())
    assert found["cgroup"] == {"limit": 8_000_000_000, "used": 7_000_000_000, "oom_kills": 2}
    assert any("limit 8.0 GB, 2 killed for want of it" in line for line in format_block(found, "x"))


def test_a_secret_behind_an_option_is_masked(tmp_path: Path) -> None:
    found = mortem(tmp_path).gather(failure(argv=("vllm", "--api-key", "unheard-of", "--hf-token=unheard-of")))
    assert "unheard-of" not in json.dumps(found)


def test_of_vllms_lines_a_bundle_has_all_but_the_secrets(tmp_path: Path) -> None:
    found = mortem(tmp_path, **SECRETS).gather(failure(log=LOG))
    assert "planted" not in json.dumps(found)
    assert any("is not a model" in line for line in found["log"])


def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(postmortem, "GPU_PATIENCE", 0.05)
    monkeypatch.setattr(postmortem, "read_gpus", never.wait)
    assert mortem(tmp_path).gather(failure())["gpu"] is None
    never.set()


def test_gpus_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"driver": "580.65.06", "gpus": [{"name": "NVIDIA X", "used": 1_000_000_000, "total": 80_000_000_000}]}
    monkeypatch.setattr(postmortem, "read_gpus", lambda: seen)
    lines = format_block(mortem(tmp_path).gather(failure()), "x")
    assert "  gpu:        NVIDIA X 1.0 GB of 80.0 GB in use; driver 580.65.06" in lines


def test_a_fault_of_our_own_is_no_fault_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def write() -> None:
        found = mortem(tmp_path)
        monkeypatch.setattr(found, "gather", lambda failure: 1 / 0)
        run: Any = SimpleNamespace(child=None, log=())
        await found.run_failed(run, "restart 1 of 5", given_up=False)

    asyncio.run(write())
    assert "the post-mortem could not be written" in caplog.text
    assert bundles(tmp_path) == []
