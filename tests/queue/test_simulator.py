"""RunPod's side as a process of its own, between the real SDK's client and a worker of a few lines.

It is scripts/fake_runpod: the simulator of the product, with faults and a log.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from supervisor.local_runpod.queue import Queue, Status
from supervisor.local_runpod.simulator import Handout
from tests.harness import FAKE_RUNPOD, ROOT, wait_until

pytestmark = pytest.mark.slow

HOLD = 0.7
numbers = itertools.count(1)


class Simulator:
    """A running fake. Leaving the block ends it."""

    def __init__(self, *arguments: str, lost_after: float = 60) -> None:
        options = ["--port", "0", "--hold", str(HOLD), "--lost-after", str(lost_after), "--with-parent", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, FAKE_RUNPOD, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"simulator: (http://127\.0\.0\.1:\d+)(/v2/local)\n", line)
        assert found, line + self.process.stdout.read()
        self.root, self.url = found[1], found[1] + found[2]
        self.client = httpx.Client(base_url=self.url, timeout=30, verify=False)

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def ends(self) -> tuple[int, str]:
        """Its exit code and what it has said since its first line."""
        said, _ = self.process.communicate(timeout=10)
        return self.process.returncode, said

    # As a client

    def run(self, content: object = "x", **more: object) -> str:
        answer = self.client.post("/run", json={"input": content, **more}).raise_for_status().json()
        assert answer["status"] == "IN_QUEUE"
        return str(answer["id"])

    def status(self, job: str) -> dict[str, Any]:
        found = self.client.get(f"/status/{job}")
        return dict(found.json()) if found.status_code == 200 else {"status": found.status_code}

    def cancel(self, job: str) -> str:
        return str(self.client.post(f"/cancel/{job}").json()["status"])

    # As one who looks on

    def job(self, job: str) -> dict[str, Any]:
        return dict(self.client.get(f"{self.root}/jobs/{job}").raise_for_status().json())

    def fault(self, on: str, do: str, **more: object) -> None:
        self.client.post(f"{self.root}/faults", json={"on": on, "do": do, **more}).raise_for_status()

    def log(self, since: int = 0) -> list[dict[str, Any]]:
        return list(self.client.get(f"{self.root}/log", params={"since": since}).json())

    def open_polls(self, since: int = 0) -> int:
        return sum(entry["status"] is None and entry["fault"] is None for entry in self.log(since))


class Worker:
    """The platform's side, by hand."""

    def __init__(self, simulator: Simulator, name: str = "worker") -> None:
        self.name = name
        self.http = httpx.Client(base_url=simulator.url, timeout=30, verify=False, headers={"Authorization": "KEY"})

    def take(self) -> dict[str, Any] | None:
        answer = self.http.get(f"/job-take/{self.name}?gpu=NVIDIA+H100&job_in_progress=0").raise_for_status()
        assert answer.status_code == 204 or answer.headers["content-type"] == "application/json"
        return dict(answer.json()) if answer.status_code == 200 else None

    def takes(self, job: str) -> None:
        taken = self.take()
        assert taken
        assert taken["id"] == job

    def batch(self, size: int) -> list[str]:
        answer = self.http.get(f"/job-take-batch/{self.name}?gpu=x&batch_size={size}").raise_for_status()
        return [job["id"] for job in answer.json()] if answer.status_code == 200 else []

    def stops(self) -> list[str]:
        answer = self.http.get(f"/job-stop/{self.name}?gpu=x").raise_for_status()
        return list(answer.json()["jobsToStop"]) if answer.status_code == 200 else []

    def post(self, route: str, job: str, content: object, key: str | None = None, stream: str = "true") -> int:
        headers = {"Content-Type": "application/x-www-form-urlencoded", **({"Idempotency-Key": key} if key else {})}
        path = f"/{route}/{self.name}/{job}?gpu=x&isStream={stream}"
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.http.post(path, content=body, headers=headers).status_code

    def chunk(self, job: str, output: object, key: str | None = None) -> int:
        return self.post("job-stream", job, {"output": output}, key, stream="false")

    def done(self, job: str, content: object, key: str | None = None) -> int:
        return self.post("job-done", job, content, key)

    def ping(self, **params: str) -> None:
        self.http.get(f"/ping/{self.name}", params={"gpu": "x", **params}).raise_for_status()


@pytest.fixture(scope="module")
def running() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator
        simulator.process.terminate()
        assert simulator.ends() == (0, "")  # no test has made it complain


@pytest.fixture
def simulator(running: Simulator) -> Simulator:
    """Without faults, jobs or polls of the test before."""
    running.client.delete(f"{running.root}/faults")
    running.client.post("/purge-queue")
    wait_until(lambda: not running.open_polls(), "the polls of the test before are over")
    return running


@pytest.fixture
def worker(simulator: Simulator) -> Iterator[Worker]:
    worker = Worker(simulator, f"w{next(numbers)}")  # one that is told of no job of the test before
    yield worker
    worker.http.close()


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[Any]]]:
    """Calls that wait, each in a thread."""
    with ThreadPoolExecutor(8) as threads:
        yield threads.submit


# Jobs and their order


def test_a_job_goes_to_a_worker_and_its_result_to_the_client(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run({"prompt": "hi"}, webhook="https://nowhere.test", policy={"executionTimeout": 60000})
    assert re.fullmatch(r"[0-9a-f-]{36}-u1", job)
    assert worker.take() == {
        "id": job,
        "input": {"prompt": "hi"},
        "webhook": "https://nowhere.test",
        "policy": {"executionTimeout": 60000},
    }
    assert simulator.status(job)["status"] == "IN_PROGRESS"
    assert worker.done(job, {"status": "IN_PROGRESS", "output": "half"}) == 200
    assert simulator.status(job)["output"] == "half"
    assert worker.done(job, {"output": [1, 2]}) == 200
    found = simulator.status(job)
    assert found.pop("delayTime") >= 0
    assert found.pop("executionTime") >= 0
    assert found == {"id": job, "status": "COMPLETED", "workerId": worker.name, "output": [1, 2]}
    seen = simulator.job(job)
    assert [post["status"] for post in seen["posts"]] == [200, 200]
    assert seen["timeline"]["created"] <= seen["timeline"]["taken"] <= seen["timeline"]["done"]


def test_an_empty_input_arrives_without_the_key(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run({})
    assert worker.take() == {"id": job}


def test_batches_are_the_oldest_jobs_and_low_priority_comes_last(simulator: Simulator, worker: Worker) -> None:
    late = simulator.run(policy={"lowPriority": True})
    first, second, third = (simulator.run(number) for number in range(3))
    assert worker.batch(2) == [first, second]
    assert worker.batch(5) == [third, late]


def test_an_empty_poll_is_held(simulator: Simulator, worker: Worker, aside: Callable[..., Future[Any]]) -> None:
    before = time.monotonic()
    for poll in [aside(worker.take), aside(worker.stops), aside(worker.batch, 3)]:
        assert not poll.result()
        assert HOLD <= time.monotonic() - before < HOLD + 1


def test_pollers_are_served_in_the_order_they_came(
    simulator: Simulator, worker: Worker, aside: Callable[..., Future[Any]]
) -> None:
    other = Worker(simulator, "other")
    first = aside(worker.take)
    wait_until(lambda: simulator.open_polls() == 1, "the first poll")
    second = aside(other.batch, 4)
    wait_until(lambda: simulator.open_polls() == 2, "the second poll")
    jobs = [simulator.run(), simulator.run()]
    assert first.result()["id"] == jobs[0]
    assert second.result() == [jobs[1]]


def test_a_poller_that_left_gets_nothing(simulator: Simulator, worker: Worker) -> None:
    port = int(simulator.root.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as leaver:
        leaver.sendall(b"GET /v2/local/job-take/leaver?gpu=x HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: simulator.open_polls() == 1, "the poll")
    job = simulator.run()
    worker.takes(job)
    assert simulator.job(job)["worker"] == worker.name


def test_jobs_that_could_not_be_written_go_back_to_the_front() -> None:
    async def scenario() -> None:
        queue = Queue(hold=1, lost_after=60)
        jobs = [queue.submit({"input": number}, sync=False) for number in range(3)]
        worker = queue.note_worker("w")
        taken = await queue.take(worker, 2)
        assert taken == jobs[:2]
        closed = SimpleNamespace(is_closing=lambda: True)
        handed = Handout([job.worker_view() for job in taken], partial(queue.put_back, taken))
        await handed({"type": "http", "state": {"transport": closed}}, nothing, nothing)
        assert [job.status for job in jobs] == [Status.IN_QUEUE] * 3
        assert await queue.take(worker, 3) == jobs

    async def nothing(*_: object) -> Any:
        return None

    asyncio.run(scenario())


def test_errors_fail_the_job(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run()
    worker.takes(job)
    worker.done(job, {"output": {"a": 1}, "error": {"message": "no"}})
    found = simulator.status(job)
    assert (found["status"], found["error"], found["output"]) == ("FAILED", {"message": "no"}, {"a": 1})
    assert simulator.client.post(f"/retry/{job}").json() == {"id": job, "status": "IN_QUEUE"}
    worker.takes(job)
    worker.done(job, {})
    found = simulator.status(job)
    assert found["status"] == "COMPLETED"
    assert found.keys().isdisjoint({"output", "error"})
    assert simulator.client.post(f"/retry/{job}").status_code == 400


def test_a_cancelled_job_reaches_its_workers_stop_channel(
    simulator: Simulator, worker: Worker, aside: Callable[..., Future[Any]]
) -> None:
    job = simulator.run()
    worker.takes(job)
    told = aside(worker.stops)
    wait_until(simulator.open_polls, "the stop poll")
    assert simulator.cancel(job) == "CANCELLED"
    assert told.result() == [job]
    assert worker.chunk(job, "late") == 200
    assert worker.done(job, {"output": "late"}) == 200
    assert simulator.job(job)["late"] == 2
    assert simulator.status(job)["status"] == "CANCELLED"
    assert "output" not in simulator.status(job)


def test_a_job_cancelled_in_the_queue_is_never_taken(simulator: Simulator, worker: Worker) -> None:
    cancelled, purged = simulator.run(), simulator.run()
    assert simulator.cancel(cancelled) == "CANCELLED"
    assert simulator.client.post("/purge-queue").json() == {"removed": 1, "status": "completed"}
    assert simulator.status(purged)["status"] == "CANCELLED"
    fresh = simulator.run()
    assert worker.batch(9) == [fresh]


def test_execution_timeout_and_ttl(simulator: Simulator, worker: Worker) -> None:
    slow = simulator.run(policy={"executionTimeout": 50})
    worker.takes(slow)
    assert worker.stops() == [slow]
    assert simulator.status(slow)["status"] == "TIMED_OUT"
    short = simulator.run(policy={"ttl": 50})
    wait_until(lambda: simulator.status(short)["status"] == 404, "the job is gone")
    fresh = simulator.run()
    assert worker.batch(9) == [fresh]


def test_lost_jobs_come_once_more_and_then_fail() -> None:
    with Simulator(lost_after=0.4) as simulator:
        worker, other = Worker(simulator), Worker(simulator, "other")
        job = simulator.run()
        worker.takes(job)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            worker.ping(job_id=f"{job},more")  # of its worker, so it is not lost
            other.ping()
            assert simulator.status(job)["status"] == "IN_PROGRESS"
        wait_until(lambda: simulator.status(job)["status"] == "IN_QUEUE", "no ping names it any more")
        assert simulator.status(job)["retries"] == 1
        other.takes(job)
        assert worker.done(job, {"output": "of the first worker"}) == 200
        assert simulator.job(job)["late"] == 1
        wait_until(lambda: simulator.status(job)["status"] == "FAILED", "lost twice")
        assert simulator.status(job)["error"] == "job timed out after 1 retries"


def test_a_job_that_comes_again_takes_its_old_place() -> None:
    async def scenario() -> None:
        queue = Queue(hold=1, lost_after=60)
        worker = queue.note_worker("w")
        first, second, third = (queue.submit({"input": number}, sync=False) for number in range(3))
        low = queue.submit({"input": 3, "policy": {"lowPriority": True}}, sync=False)
        assert await queue.take(worker, 2) == [first, second]
        queue.put_back([second])
        queue.put_back([first])
        queue.put_back([third])  # which was not handed out
        assert await queue.take(worker, 9) == [first, second, third, low]
        queue.store_result(worker, first, b'{"error": "no"}', "1")
        assert first.status is Status.FAILED
        late = queue.submit({"input": 4}, sync=False)
        queue.retry(first)  # as if it were new
        assert await queue.take(worker, 9) == [late, first]

    asyncio.run(scenario())


def test_a_job_that_is_gone_does_not_come_back() -> None:
    async def scenario() -> None:
        queue = Queue(hold=1, lost_after=60)
        worker = queue.note_worker("w")
        job = queue.submit({"input": 1, "policy": {"ttl": 20}}, sync=False)
        taken = await queue.take(worker, 1)
        assert await queue.take_stops(worker) == [job.id]
        assert (job.status, queue.jobs) == (Status.EXPIRED, {})
        queue.put_back(taken)
        assert job.status is Status.EXPIRED
        assert not job.timers

    asyncio.run(scenario())


# Posts


def test_a_key_that_was_seen_stores_nothing_again(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run()
    worker.takes(job)
    posts = [("a", "1"), ("a", "1"), ("b", "2"), ("a", "1"), ("b", None)]
    assert [worker.chunk(job, text, key) for text, key in posts] == [200] * 5
    assert [worker.done(job, {"output": number}, "3") for number in range(2)] == [200, 200]
    seen = simulator.job(job)
    assert [(chunk["output"], chunk["key"]) for chunk in seen["chunks"]] == [("a", "1"), ("b", "2"), ("b", None)]
    assert seen["duplicates"] == 3
    assert simulator.status(job)["output"] == 0


def test_limits_of_what_workers_post(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run()
    worker.takes(job)
    around = len('{"output": ""}')
    assert worker.chunk(job, "x" * (1_000_000 - around)) == 200
    assert worker.chunk(job, "x" * (1_000_001 - around)) == 400
    assert worker.post("job-stream", job, b"{") == 400
    assert worker.post("job-stream", job, b'{"output": NaN}') == 400
    assert worker.done(job, b"[]") == 400
    assert worker.chunk("no-such-job", "x") == 404
    assert worker.done(job, {"output": "x" * 10_000_000}) == 400
    seen = simulator.job(job)
    assert [chunk["bytes"] for chunk in seen["chunks"]] == [1_000_000]
    assert (seen["state"], "output" in seen) == ("COMPLETED", False)


def test_half_a_surrogate_pair_passes(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run()
    worker.takes(job)
    worker.post("job-done", job, b'{"output": "\\ud83d"}')
    assert r'"\ud83d"' in simulator.client.get(f"/status/{job}").text


# What clients ask


def test_stream_gives_the_chunks_since_the_last_call(
    simulator: Simulator, worker: Worker, aside: Callable[..., Future[Any]]
) -> None:
    def stream() -> dict[str, Any]:
        return dict(simulator.client.post(f"/stream/{job}").json())

    job = simulator.run()
    worker.takes(job)
    waits = aside(stream)
    worker.chunk(job, "a")
    assert waits.result() == {"status": "IN_PROGRESS", "stream": [{"output": "a"}]}
    worker.chunk(job, {"b": 1})
    worker.chunk(job, "c")
    worker.done(job, {"output": []})
    assert stream() == {"status": "COMPLETED", "stream": [{"output": {"b": 1}}, {"output": "c"}]}
    before = time.monotonic()
    assert stream() == {"status": "COMPLETED", "stream": []}
    assert time.monotonic() - before < 0.5


def test_runsync_waits_and_gives_up(simulator: Simulator, worker: Worker, aside: Callable[..., Future[Any]]) -> None:
    answered = aside(simulator.client.post, "/runsync", json={"input": 1})
    left = aside(simulator.client.post, "/runsync?wait=1000", json={"input": 2})
    jobs = [worker.take(), worker.take()]
    done = next(job["id"] for job in jobs if job and job["input"] == 1)
    assert re.fullmatch(r"sync-[0-9a-f-]{36}-u1", done)
    worker.done(done, {"output": "yes"})
    assert answered.result().json()["output"] == "yes"
    assert left.result().json()["status"] == "IN_PROGRESS"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/run", b"{", 400),
        ("/run", b'{"inputs": 1}', 400),
        ("/run", b"[]", 400),
        ("/run", b'{"input": 1, "policy": {"ttl": "1"}}', 400),
        ("/run", b" " * 10_000_001, 413),
        ("/runsync", b" " * 20_000_001, 413),
        ("/runsync?wait=999", b'{"input": 1}', 400),
        ("/openai/v1/completions", b"{", 400),
        ("/status/none", b"", 404),
        ("/cancel/none", b"", 404),
        ("/nothing", b"", 404),
    ],
)
def test_refusals(simulator: Simulator, path: str, body: bytes, status: int) -> None:
    answer = simulator.client.post(path, content=body)
    assert answer.status_code == status
    assert isinstance(answer.json()["error"], str)


def test_too_many_requests() -> None:
    with Simulator() as simulator:
        statuses = [simulator.client.post("/cancel/none").status_code for _ in range(101)]
        assert statuses == [404] * 100 + [429]
        assert simulator.client.post("/retry/none").status_code == 404


def test_health_counts_jobs_and_workers(simulator: Simulator, worker: Worker) -> None:
    queued, taken = simulator.run(), simulator.run()
    before = simulator.client.get("/health").json()
    assert before["jobs"]["inQueue"] == 2
    worker.takes(queued)
    sick = Worker(simulator, "sick")
    sick.ping(status="unhealthy", check="gpu", reason="gone")
    after = simulator.client.get("/health").json()
    assert after["jobs"]["inQueue"] == 1
    assert after["jobs"]["inProgress"] == before["jobs"]["inProgress"] + 1
    assert after["workers"]["running"] >= 1
    assert after["workers"]["unhealthy"] == 1
    seen = simulator.client.get(f"{simulator.root}/workers").json()
    assert seen["sick"]["unhealthy"][0]["params"]["reason"] == "gone"
    assert seen["sick"]["counts"] == {"ping": 1}
    sick.ping()
    assert simulator.client.get("/health").json()["workers"]["unhealthy"] == 0
    assert simulator.status(taken)["status"] == "IN_QUEUE"


# /openai


def take_and_say(worker: Worker, text: str) -> dict[str, Any]:
    job = worker.take()
    assert job
    assert worker.chunk(job["id"], text) == 200
    return job


def test_openai_streams_the_chunks_as_they_come(
    simulator: Simulator, worker: Worker, aside: Callable[..., Future[Any]]
) -> None:
    body = {"model": "m", "stream": True}
    begun = aside(take_and_say, worker, "data: 1\n\n")
    with simulator.client.stream("POST", "/openai/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = answer.iter_text()
        assert next(parts) == "data: 1\n\n"
        job = begun.result()
        assert job["input"] == {"openai_route": "/v1/chat/completions", "openai_input": body}
        worker.chunk(job["id"], "data: 2\n\nda")
        assert next(parts) == "data: 2\n\nda"
        worker.chunk(job["id"], "ta: [DONE]\n\n")
        worker.done(job["id"], {"output": []})
        assert "".join(parts) == "ta: [DONE]\n\n"
    assert simulator.status(job["id"])["status"] == "COMPLETED"


def test_a_stream_whose_client_leaves_is_cancelled(
    simulator: Simulator, worker: Worker, aside: Callable[..., Future[Any]]
) -> None:
    begun = aside(take_and_say, worker, "data: 1\n\n")
    with simulator.client.stream("POST", "/openai/v1/completions", json={"stream": True}) as answer:
        next(answer.iter_text())
    job = begun.result()["id"]
    assert worker.stops() == [job]
    assert simulator.status(job)["status"] == "CANCELLED"


def test_so_is_one_that_has_not_begun(simulator: Simulator) -> None:
    with pytest.raises(httpx.ReadTimeout):
        simulator.client.post("/openai/v1/completions", json={"stream": True}, timeout=0.1)
    wait_until(lambda: not simulator.client.get("/health").json()["jobs"]["inQueue"], "it is cancelled")


@pytest.mark.parametrize(
    ("result", "status", "kind", "text"),
    [
        ({"output": [{"id": 1}]}, 200, "application/json", '{"id": 1}'),
        ({"output": ['{"id"', ": 1}"]}, 200, "application/json", '{"id": 1}'),
        ({"output": ["data: 1\n\n", "data: 2\n\n"]}, 200, "text/plain; charset=utf-8", "data: 1\n\ndata: 2\n\n"),
        ({"output": "plain"}, 200, "text/plain; charset=utf-8", "plain"),
        ({"error": '{"error": {"code": 400}}'}, 500, "application/json", '{"error": {"code": 400}}'),
        ({"error": "{'error'"}, 500, "text/plain; charset=utf-8", "{'error'"),
    ],
)
def test_openai_answers_whole(
    simulator: Simulator,
    worker: Worker,
    aside: Callable[..., Future[Any]],
    result: dict[str, Any],
    status: int,
    kind: str,
    text: str,
) -> None:
    asked = aside(simulator.client.get, "/openai/v1/models")
    job = worker.take()
    assert job
    assert job["input"] == {"openai_route": "/v1/models"}
    worker.done(job["id"], result)
    answer = asked.result()
    assert (answer.status_code, answer.headers["content-type"], answer.text) == (status, kind, text)


# Faults


def test_fault_status(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run()
    worker.takes(job)
    simulator.fault("job-stream", "status", status=429, times=2, after=1)
    assert [worker.chunk(job, number) for number in range(4)] == [200, 429, 429, 200]
    assert [chunk["output"] for chunk in simulator.job(job)["chunks"]] == [0, 3]
    assert simulator.client.get(f"{simulator.root}/faults").json()[0]["acted"] == 2


def test_fault_reset_and_accept_reset(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run()
    worker.takes(job)
    simulator.fault("job-stream", "reset", times=1)
    simulator.fault("*", "accept-reset", times=2)  # the first one that is not used up acts
    for key in ("1", "2"):
        with pytest.raises(httpx.ReadError, match="reset by peer"):
            worker.chunk(job, key, key)
    simulator.client.delete(f"{simulator.root}/faults")
    assert [worker.chunk(job, key, key) for key in ("1", "2")] == [200, 200]
    assert [chunk["output"] for chunk in simulator.job(job)["chunks"]] == ["2", "1"]


def test_fault_drop_delay_and_empty(simulator: Simulator, worker: Worker) -> None:
    job = simulator.run()
    simulator.fault("job-take", "empty", times=1)
    before = time.monotonic()
    assert worker.take() is None
    assert time.monotonic() - before < HOLD
    simulator.fault("job-take", "delay", seconds=0.1, times=1)
    before = time.monotonic()
    worker.takes(job)
    assert time.monotonic() - before >= 0.1
    simulator.fault("job-done", "drop", times=1)
    with pytest.raises(httpx.ReadTimeout):
        worker.http.post(f"/job-done/{worker.name}/{job}", json={"output": 1}, timeout=0.1)
    assert simulator.status(job)["status"] == "IN_PROGRESS"
    assert worker.done(job, {"output": 1}) == 200


@pytest.mark.parametrize("given", [{"on": "x", "do": "drop"}, {"on": "*", "do": "x"}, {"on": "*"}, [], {"a": 1}])
def test_faults_that_are_none(simulator: Simulator, given: object) -> None:
    answer = simulator.client.post(f"{simulator.root}/faults", json=given)
    assert answer.status_code == 400
    assert simulator.client.get(f"{simulator.root}/faults").json() == []


def test_the_log_has_what_workers_sent(simulator: Simulator, worker: Worker) -> None:
    since = max((entry["seq"] for entry in simulator.log()), default=0)
    job = simulator.run()
    worker.takes(job)
    worker.done(job, {"output": "ü"})
    simulator.fault("ping", "status", status=503)
    worker.http.get(f"/ping/{worker.name}?job_id=a%2Cb")
    taken, done, ping = simulator.log(since)
    assert taken["seq"] == since + 1
    assert taken["at"] <= done["at"] <= ping["at"] <= time.monotonic()
    assert (taken["what"], taken["method"], taken["status"], taken["fault"]) == ("job-take", "GET", 200, None)
    assert taken["target"] == f"/v2/local/job-take/{worker.name}?gpu=NVIDIA+H100&job_in_progress=0"
    assert taken["headers"]["authorization"] == "KEY"
    assert (done["what"], done["body_bytes"]) == ("job-done", len(b'{"output": "\\u00fc"}'))
    assert (ping["target"], ping["status"], ping["fault"]) == (
        f"/v2/local/ping/{worker.name}?job_id=a%2Cb",
        503,
        "status",
    )


# The process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once(number: signal.Signals, aside: Callable[..., Future[Any]]) -> None:
    with Simulator("--hold", "60") as simulator:
        poll = aside(Worker(simulator).take)
        wait_until(simulator.open_polls, "the poll")
        before = time.monotonic()
        simulator.process.send_signal(number)
        assert simulator.ends() == (0, "")
        assert time.monotonic() - before < 1
        with pytest.raises(httpx.TransportError):
            poll.result()


def test_it_leaves_with_its_parent() -> None:
    with Simulator() as simulator:
        assert simulator.process.stdin is not None
        simulator.process.stdin.write("still here\n")
        simulator.process.stdin.flush()
        simulator.run()
        simulator.process.stdin.close()
        assert simulator.process.wait(10) == 0


def test_its_parent_gives_it_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RUNPOD_KEYS", "the-old-key,a-second-one")
    monkeypatch.setenv("LOCAL_RUNPOD_WORKER_KEY", "the-workers")
    with Simulator() as simulator:

        def ask(key: str, path: str = "health") -> int:
            return simulator.client.get(f"/{path}", headers={"Authorization": f"Bearer {key}"}).status_code

        assert [ask(key) for key in ("the-old-key", "a-second-one", "the-new-key")] == [200, 200, 401]
        assert simulator.process.stdin is not None
        simulator.process.stdin.write("keys the-new-key,a-second-one\n")
        simulator.process.stdin.flush()
        wait_until(lambda: ask("the-new-key") == 200, "the new key")
        assert [ask(key) for key in ("the-old-key", "a-second-one")] == [401, 200]
        assert ask("the-workers", "ping/w") == 200


def test_the_simulator_of_the_product_has_no_faults() -> None:
    command = [sys.executable, "-m", "supervisor.local_runpod.simulator", "--port", "0", "--with-parent"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        assert httpx.get(f"{url}/health").json()["jobs"]["inQueue"] == 0
        for path in ("faults", "log", "workers", "jobs/x"):
            assert httpx.get(f"{url.rpartition('/v2/')[0]}/{path}").status_code == 404
        process.terminate()
        assert process.wait(10) == 0


def test_a_port_that_is_taken(simulator: Simulator) -> None:
    port = simulator.root.rpartition(":")[2]
    command = [sys.executable, "-m", "supervisor.local_runpod.simulator", "--port", port]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("simulator: cannot listen: Address already in use")
    assert port in ended.stderr


# The SDK's client


def test_the_sdks_client(
    simulator: Simulator, worker: Worker, aside: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sdk = pytest.importorskip("runpod")
    # It sleeps a second before each look at a stream. What it asks and understands is what matters here.
    monkeypatch.setattr("runpod.endpoint.runner.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(sdk, "api_key", "KEY")
    monkeypatch.setattr(sdk, "endpoint_url_base", simulator.url.removesuffix("/local"))
    endpoint = sdk.Endpoint("local")
    streamed = endpoint.run({"input": {"prompt": "hi"}})
    worker.takes(streamed.job_id)
    chunks = aside(lambda: list(streamed.stream()))
    for text in ("a", "b"):
        worker.chunk(streamed.job_id, text)
    worker.done(streamed.job_id, {"output": ["a", "b"]})
    assert chunks.result() == ["a", "b"]

    job = endpoint.run({"prompt": "hi"})
    assert job.status() == "IN_QUEUE"
    worker.takes(job.job_id)
    assert job.status() == "IN_PROGRESS"
    worker.done(job.job_id, {"output": {"text": "yes"}})
    assert job.output(timeout=5) == {"text": "yes"}
    assert job.status() == "COMPLETED"

    answered = aside(endpoint.run_sync, {"input": {"prompt": "hi"}}, timeout=10)
    taken = worker.take()
    assert taken
    worker.done(taken["id"], {"output": "at once"})
    assert answered.result() == "at once"

    cancelled = endpoint.run({"prompt": "hi"})
    assert endpoint.health()["jobs"]["inQueue"] == 1
    assert cancelled.cancel() == {"id": cancelled.job_id, "status": "CANCELLED"}
    assert endpoint.purge_queue()["removed"] == 0
