"""What other programs print: it need not be text."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.around import postmortem
from supervisor.around.stacks import Stacks


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Prints the name of a process, cut within a letter, as nvidia-smi's table has it."""
    path = tmp_path / "nvidia-smi"
    path.write_text("#!/bin/sh\nprintf 'caf\\303...\\n'\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return str(path)


def test_a_name_that_is_cut_within_a_letter_loses_no_post_mortem(program: str) -> None:
    assert postmortem._run_nvidia_smi() == "caf\ufffd...\n"


def test_a_name_that_is_cut_within_a_letter_loses_no_stacks(program: str, caplog: pytest.LogCaptureFixture) -> None:
    Stacks()._dump(program, {1: "VLLM::EngineCore"})
    assert "stacks of VLLM::EngineCore (pid 1):\ncaf\ufffd..." in caplog.text
