"""scripts/fake_runpod and a supervisor that takes its jobs with the real SDK, over the fake vLLM.

    with RunPod("--hold", "2") as runpod, in_queue_mode(runpod) as supervisor:
        supervisor.ready()
        joined(runpod)
        output = runpod.done({"prompt": "x"})

Most tests share the fixtures `runpod` and `endpoint`, and leave them as they found them. Times are in seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from supervisor.local_runpod.child import runpod_variables as simulated
from tests.harness import FAKE_RUNPOD, Supervisor, wait_until

# The statuses of a job that is over.
FINAL_STATUSES = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


class RunPod:
    """A process of scripts/fake_runpod, ended by force with the block, and what a test asks it.

    It is asked as RunPod's clients do (`run`, `result` ...), and as only a fake can be (`job`, `log`, `fault`).
    """

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, FAKE_RUNPOD, "--port", "0", "--with-parent", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith("simulator: http"), line
        self.url = line.split()[1]
        self.base = self.url.rpartition("/v2/")[0]
        self.http = httpx.Client(verify=False, timeout=60)
        self._seen: list[dict[str, Any]] = []  # the log's entries until now

    def __enter__(self) -> RunPod:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def environment(self, **more: str) -> dict[str, str]:
        """Returns the environment of a worker of this RunPod, and `more`."""
        return simulated(self.url) | {"RUNPOD_PING_INTERVAL": "1000"} | more

    # As a client

    def run(self, content: object, **more: object) -> str:
        """Hands a job in, and returns its id. `more` stands beside `input`: policy, webhook."""
        answer = self.http.post(f"{self.url}/run", json={"input": content, **more})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"{self.url}/status/{job_id}").json())

    def result(self, job_id: str, seconds: float = 20) -> dict[str, Any]:
        """Waits until the job is over, and returns what its client then reads of it."""
        wait_until(lambda: self.status(job_id)["status"] in FINAL_STATUSES, f"the end of job {job_id}", seconds)
        return self.status(job_id)

    def done(self, content: object, seconds: float = 20) -> Any:
        """Runs a job that completes, and returns its output."""
        status = self.result(self.run(content), seconds)
        assert status["status"] == "COMPLETED", status
        return status.get("output")

    def failed(self, content: object, seconds: float = 20) -> dict[str, Any]:
        """Runs a job that fails, and returns its error, which is the JSON text of an object."""
        status = self.result(self.run(content), seconds)
        assert status["status"] == "FAILED", status
        return dict(json.loads(status["error"]))

    # As the platform

    def job(self, job_id: str) -> dict[str, Any]:
        """Returns everything that the platform knows of a job: chunks, posts, times."""
        return dict(self.http.get(f"{self.base}/jobs/{job_id}").json())

    def log(self, what: str = "") -> list[dict[str, Any]]:
        """Returns the requests of workers until now; with `what` only those of one kind, such as job-take."""
        since = self._seen[-1]["seq"] if self._seen else 0
        self._seen += self.http.get(f"{self.base}/log", params={"since": since}).json()
        return [entry for entry in self._seen if not what or entry["what"] == what]

    def fault(self, on: str, do: str, **more: object) -> None:
        """Adds a fault for workers' requests of the kind `on` (docs/development/simulator.md), until `no_faults`."""
        answer = self.http.post(f"{self.base}/faults", json={"on": on, "do": do, **more})
        assert answer.status_code < 300, answer.text

    def no_faults(self) -> None:
        """Takes all faults back."""
        self.http.delete(f"{self.base}/faults")

    def worker(self) -> dict[str, Any]:
        return dict(self.http.get(f"{self.base}/workers").json())


def in_queue_mode(runpod: RunPod, *arguments: str, environ: dict[str, str] | None = None, **more: Any) -> Supervisor:
    """Returns a supervisor that takes this RunPod's jobs, to be entered as a block.

    Its gateway listens on a port as well, for a look at `/status` and `/fake/state`.
    """
    return Supervisor("m", *arguments, environ=runpod.environment(**(environ or {})), **more)


def joined(runpod: RunPod, seconds: float = 20) -> None:
    """Waits until the worker polls for jobs."""
    wait_until(lambda: runpod.log("job-take-batch") or runpod.log("job-take"), "the first take", seconds)


@pytest.fixture(scope="session")
def runpod() -> Iterator[RunPod]:
    with RunPod("--hold", "5") as found:
        yield found


@pytest.fixture(scope="session")
def endpoint(runpod: RunPod) -> Iterator[Supervisor]:
    """A supervisor in queue mode that serves and takes jobs, for tests that leave it as they found it."""
    with in_queue_mode(runpod) as supervisor:
        supervisor.ready()
        joined(runpod)
        yield supervisor


@pytest.fixture(autouse=True)
def _no_faults_are_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "runpod" in request.fixturenames:
        request.getfixturevalue("runpod").no_faults()
