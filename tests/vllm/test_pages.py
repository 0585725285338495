"""README.md's commands and the examples of docs/jobs.md, as they stand there, on the real vLLM."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, Supervisor, clean_environment
from tests.pages import QUEUE, TRY, differences, examples, read_shown
from tests.queue.conftest import RunPod
from tests.vllm.conftest import link_to

pytestmark = pytest.mark.vllm

UP, CURL, JOB = QUEUE.commands()


# README.md


class Newcomer:
    """A shell in a fresh clone."""

    def __init__(self, environ: dict[str, str], supervisor: Supervisor) -> None:
        self.environ = environ
        self.port = supervisor.port

    def says(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command.replace("127.0.0.1:8000/", f"127.0.0.1:{self.port}/")],
            cwd=ROOT, env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def newcomer(served: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """After the first command. Its vLLM is the one that serves the other tests: half a minute less."""
    folder = tmp_path_factory.mktemp("newcomer")
    # No environment is active in that shell.
    path = [part for part in os.environ["PATH"].split(":") if Path(part) != Path(sys.prefix) / "bin"]
    environ = {"TMPDIR": str(folder), "PATH": ":".join(path)}
    with Supervisor(
        program=("bash", "-c", f"exec {UP}"), vllm=link_to(served, folder), cwd=ROOT, environ=environ
    ) as supervisor:
        supervisor.says(r"ready: a simulated RunPod endpoint", 60)
        yield Newcomer(clean_environment(**environ), supervisor)
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code(30) == 0


def test_the_readmes_first_question(served: Supervisor) -> None:
    """`served` is what the first command started."""
    _, curl = TRY.commands()
    answer: dict[str, Any] = json.loads(Newcomer(clean_environment(), served).says(curl))
    assert answer["model"] == "demo"
    text = answer["choices"][0]["message"]["content"]
    assert len(text.split()) >= 4, text


def test_the_readmes_curl(newcomer: Newcomer) -> None:
    answer: dict[str, Any] = json.loads(newcomer.says(CURL))
    assert answer["status"] == "COMPLETED"
    (output,) = answer["output"]
    text = output["choices"][0]["message"]["content"]
    assert len(text.split()) >= 4, text  # sampled, so not always the same words


def test_the_readmes_job(newcomer: Newcomer) -> None:
    text = newcomer.says(JOB)
    assert len(text.split()) >= 4, text
    assert "{" not in text


# docs/jobs.md

# Shown in part: a recording.
RECORDING = '"UklGR..."'
SILENCE = base64.b64encode(b"RIFF" + bytes(40)).decode()


@pytest.mark.parametrize(("asked", "page"), examples(), ids=[asked[:60] for asked, _ in examples()])
def test_an_example_of_a_job(runpod: RunPod, served: Supervisor, asked: str, page: str) -> None:
    if RECORDING in asked:  # the demo model hears nothing
        error = runpod.failed(json.loads(asked.replace(RECORDING, json.dumps(SILENCE))))
        assert (error["status"], page) == (404, "")
        assert error["message"].startswith("The model has no route /v1/audio/transcriptions")
        return
    assert "..." not in asked
    job = runpod.run(json.loads(asked))
    status = runpod.result(job)
    expected: Any = read_shown(page.replace("JOB", job))
    whole = isinstance(expected, dict) and "status" in expected
    found = list(differences(expected, status if whole else status.get("output")))
    assert not found, "\n".join(found)
