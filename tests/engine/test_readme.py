"""README.md's commands as they stand there, over the fake vLLM (on the real one: tests/vllm/test_pages.py).

Those with docker are run by tests/containers/test_image.py, the wrong settings by tests/engine/test_cli.py.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import FAKE, ROOT, Supervisor, clean_environment
from tests.pages import OWN_VLLM, QUEUE, TRY


@contextmanager
def pasted(command: str, folder: Path, vllm: Path | None = FAKE, **environ: str) -> Iterator[Supervisor]:
    """It serves, in the folder of a clone, and is ended by Ctrl-C."""
    program = ("bash", "-c", re.sub(r"(?=scripts/up)", "exec ", command, count=1))
    environ["TMPDIR"] = str(folder)
    with Supervisor(program=program, vllm=vllm, cwd=ROOT, environ=environ) as supervisor:
        yield supervisor
        supervisor.signal(signal.SIGINT)
        assert supervisor.exit_code(30) == 0


def printed(command: str, supervisor: Supervisor, **environ: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command.replace("127.0.0.1:8000/", f"127.0.0.1:{supervisor.port}/")],
        cwd=ROOT, env=clean_environment(**environ), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_clone_to_an_answer(tmp_path: Path) -> None:
    up, curl = TRY.commands()
    with pasted(up, tmp_path) as supervisor:
        supervisor.ready()
        answer: dict[str, Any] = json.loads(printed(curl, supervisor))
        assert answer["model"] == "demo"
        assert answer["choices"][0]["message"]["content"]
        page = supervisor.client.get("/", headers={"Accept": "text/html"})
        assert page.headers["content-type"].startswith("text/html")


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path: Path) -> None:
    mine, _ = OWN_VLLM.commands()
    assert "--port 9000" in mine
    with pasted(mine.replace("9000", "0"), tmp_path) as supervisor:
        supervisor.ready()
        assert [model["id"] for model in supervisor.client.get("/v1/models").json()["data"]] == ["Qwen/Qwen3-0.6B"]
        command = supervisor.client.get("/status").json()["command"]
        assert command.endswith(" --max-model-len 4096")


@pytest.mark.slow
def test_the_stand_in(tmp_path: Path) -> None:
    _, stand_in = OWN_VLLM.commands()
    with pasted(stand_in, tmp_path, vllm=None) as supervisor:
        supervisor.ready()
        assert f"{FAKE} serve x " in supervisor.client.get("/status").json()["command"]


@pytest.mark.slow
def test_the_queue_on_a_laptop(tmp_path: Path) -> None:
    up, curl, job = QUEUE.commands()
    with pasted(up, tmp_path) as supervisor:
        supervisor.says("ready: a simulated RunPod endpoint", 30)
        assert json.loads(printed(curl, supervisor))["status"] == "COMPLETED"
        assert printed(job, supervisor, TMPDIR=str(tmp_path)).strip()
