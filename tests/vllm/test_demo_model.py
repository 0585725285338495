"""The bundled model is what its script and its text make, and small enough to be in the repository."""

from __future__ import annotations

import subprocess

import pytest

from tests.harness import DEMO, ROOT

pytestmark = pytest.mark.vllm


def test_the_shipped_model_is_what_the_script_makes() -> None:
    """Tokenizer byte for byte, weights by what they answer; training it anew takes ten minutes and is not done here."""
    python = ROOT / ".vllm" / "bin" / "python"
    done = subprocess.run(
        [str(python), str(ROOT / "scripts/train_demo_model.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_weights_are_at_most_4_mb() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 4_000_000
