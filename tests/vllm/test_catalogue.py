"""The catalogue of options against the installed vLLM's own parser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.vllm import catalogue
from supervisor.vllm.installed import Vllm, find
from tests.harness import ROOT
from tests.vllm.conftest import VLLM

pytestmark = pytest.mark.vllm


def test_the_shipped_catalogue_is_what_vllm_has() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/dump_flags.py"), "--check", "--vllm", str(VLLM)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_vllm_is_found_with_its_version_and_python_without_running_it(tmp_path: Path) -> None:
    vllm = find(str(VLLM), None, tmp_path)
    assert vllm.version == "0.32.0"
    assert vllm.python is not None
    assert Path(vllm.python[0]).resolve() == (VLLM.parent / "python").resolve()


def test_a_version_without_a_file_is_dumped_on_the_spot(tmp_path: Path) -> None:
    vllm = find(str(VLLM), None, tmp_path)
    unknown = Vllm(vllm.command, "0.32.0-of-my-own", vllm.python)
    assert catalogue.load(unknown, tmp_path).by_key.keys() == catalogue.load(vllm, tmp_path).by_key.keys()
    assert (tmp_path / "flags" / "0.32.0-of-my-own.json").exists()
