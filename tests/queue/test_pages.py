"""The commands of docs/development/simulator.md and docs/runpod.md, as they stand there, over the fake vLLM."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import FAKE, ROOT, Supervisor, clean_environment, wait_until
from tests.pages import (
    BALANCER_IN_THE_CLOUD,
    CLIENT,
    FAKE_RUNPOD,
    FAULTS,
    NAMED_BLOCKS,
    PAGES,
    QUEUE_IN_THE_CLOUD,
    SIMULATOR,
    WORKER,
    Block,
    blocks,
    differences,
    read_shown,
)
from tests.queue.conftest import RunPod


def pasted(command: str, **environ: str) -> Any:
    """What it prints, which is JSON, or else text."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=clean_environment(**environ), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    try:
        return json.loads(done.stdout)
    except ValueError:
        return done.stdout


# Without a process


@pytest.mark.parametrize("page", PAGES)
def test_each_block_of_a_page_is_one_that_is_known(page: str) -> None:
    """A new one is to be run by a test, or to be named in tests/pages.py as one that can't be."""
    known = [block for block in NAMED_BLOCKS if block.page == page]
    for text in blocks(page):
        assert len([block for block in known if block.mark in text]) == 1, text
    assert len(known) == len(blocks(page))


@pytest.mark.parametrize(
    ("page", "found", "fits"),
    [
        ('{"a": 1}', {"a": 1}, True),
        ('{"a": 1}', {"a": 2}, False),
        ('{"a": 1}', {"a": True}, False),
        ('{"a": 1}', {"a": 1, "b": 2}, False),
        ('{"a": 1, ...}', {"a": 1, "b": 2}, True),
        ('{"a": 1, ...}', {"b": {"a": 1}}, False),
        ('{..., "a": {"b": null, ...}}', {"a": {"b": None}}, True),
        ('{..., "a": {"b": null, ...}}', {"a": {"c": None}, "b": None}, False),
        ("[1, 2]", [1], False),
        ("[1, ..., 9]", [1, 9], True),
        ("[1, ..., 9]", [1, 2, 3, 9], True),
        ("[1, ..., 9]", [1], False),
        ("[1, ..., 9]", [1, 9, 2], False),
        ('"a ...z"', "a b\n z", True),
        ('"a ...z"', "a b", False),
        ('"a.b"', "a-b", False),
    ],
)
def test_what_is_shown_is_compared(page: str, found: object, fits: bool) -> None:
    assert (not list(differences(read_shown(page), found))) == fits


# docs/development/simulator.md


@contextlib.contextmanager
def running(block: Block) -> Iterator[str]:
    """Its address, in place of `http://127.0.0.1:8000`; what the page says behind `#` is what it prints."""
    command, _, told = block.text().strip().partition("#")
    with subprocess.Popen(
        ["bash", "-c", f"exec {command} --port 0"], cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            at = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert at is not None, line
            assert line.strip() == told.strip().replace("http://127.0.0.1:8000", at[0])
            yield at[0]
        finally:
            process.terminate()


@contextlib.contextmanager
def working(simulator: str) -> Iterator[None]:
    *exports, up = WORKER.commands()
    command = "\n".join([*exports, f"exec {up}"]).replace("http://127.0.0.1:8000", simulator)
    with Supervisor(program=("bash", "-c", command), vllm=FAKE, cwd=ROOT, environ={"PORT": ""}) as supervisor:
        yield
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code(30) == 0


@pytest.mark.slow
@pytest.mark.parametrize("block", [SIMULATOR, FAKE_RUNPOD])
def test_the_simulators_page(block: Block) -> None:
    with running(block) as simulator, working(simulator):
        text = pasted(CLIENT.text().replace("http://127.0.0.1:8000", simulator))
        assert text.startswith("data: {")
        assert text.endswith("data: [DONE]\n\n")
        if block is FAKE_RUNPOD:
            post, look, remove = (command.replace("localhost:8000", simulator) for command in FAULTS.commands())
            (fault,) = pasted(post)
            assert (fault["on"], fault["do"], fault["times"], fault["acted"]) == ("job-done", "accept-reset", 2, 0)
            pasted(CLIENT.text().replace("http://127.0.0.1:8000", simulator))
            wait_until(lambda: pasted(look)[0]["acted"] == 2, "both faults")
            assert pasted(remove) == []


# docs/runpod.md, with addresses of ours for those of RunPod's cloud


@pytest.fixture(scope="module")
def cloud(runpod: RunPod) -> Iterator[Supervisor]:
    """The model of the page, behind the queue and by itself."""
    with Supervisor("Qwen/Qwen3-0.6B", environ=runpod.environment()) as supervisor:
        yield supervisor.ready()


ACCOUNT = {"ENDPOINT": "local", "RUNPOD_API_KEY": "some-key"}


@pytest.mark.slow
def test_what_the_page_asks_a_queue_endpoint(runpod: RunPod, cloud: Supervisor) -> None:
    answer = pasted(QUEUE_IN_THE_CLOUD.text().replace("https://api.runpod.ai", runpod.base), **ACCOUNT)
    assert answer["status"] == "COMPLETED", answer
    assert answer["output"][0]["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_what_the_page_asks_a_load_balancing_endpoint(cloud: Supervisor) -> None:
    here = f"http://127.0.0.1:{cloud.port}"
    answer = pasted(BALANCER_IN_THE_CLOUD.text().replace("https://$ENDPOINT.api.runpod.ai", here), **ACCOUNT)
    assert answer["choices"][0]["message"]["content"], answer
