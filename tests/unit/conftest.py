from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.settings.names import DEFAULTS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test, an empty one, beside a vLLM that is found and never started."""
    vllm = tmp_path / "vllm" / "bin" / "vllm"
    vllm.parent.mkdir(parents=True)
    vllm.write_text("#!/bin/false\n")
    vllm.chmod(0o755)
    (tmp_path / "vllm/lib/python3.12/site-packages/vllm-0.32.0+cu130.dist-info").mkdir(parents=True)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture(autouse=True)
def _no_access_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what a default of ours adds to each command line."""
    monkeypatch.setitem(DEFAULTS, "SUPERVISOR_ACCESS_LOG", {})
