"""The faults of the runpod SDK that `supervisor/queue/sdk.py` and `child.py` contain, shown on workers without them.

A test that fails after the SDK was updated is good news: look whether what it stands for can go. The tests of seams
at the end are the exception: without a seam the containment does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.harness import clean_environment, wait_until
from tests.queue.conftest import RunPod

pytestmark = pytest.mark.slow

PLAIN = Path(__file__).with_name("plain_worker.py")
MANY = 200
# A paced loop is not there yet after this median gap, however busy the machine.
AT_ONCE = 0.03


class PlainWorker:
    """A process, its log lines as they arrive, and its heartbeat's process. Ended by force with the block."""

    def __init__(self, runpod: RunPod, jobs: int, handler: str = "generator", **environ: str) -> None:
        settings = {"PLAIN_JOBS": str(jobs), "PLAIN_HANDLER": handler}
        # Its checks of the machine reach for the internet and the GPU.
        checks = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true"}
        self.runpod = runpod
        self.process = subprocess.Popen(
            [sys.executable, str(PLAIN)],
            env=clean_environment(**runpod.environment(**settings, **checks, **environ)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        self._kin = [psutil.Process(self.process.pid)]
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    def __enter__(self) -> PlainWorker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print("the plain worker said:\n", *[line for _, line in self.lines[-50:]])
        self.kill()
        for process in self._kin:
            with contextlib.suppress(psutil.NoSuchProcess):  # it compares more than the number
                process.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self._kin += self._kin[0].children(recursive=True)
            self.process.kill()
            self.process.wait()

    def said(self, *parts: str) -> list[tuple[float, str]]:
        """Its lines with all of these in them."""
        return [entry for entry in list(self.lines) if all(part in entry[1] for part in parts)]

    def says(self, *parts: str, times: int = 1, seconds: float = 20) -> list[tuple[float, str]]:
        wait_until(lambda: len(self.said(*parts)) >= times, f"{times} lines of the worker with {parts}", seconds)
        return self.said(*parts)

    def job(self, *pieces: object) -> str:
        """Of the generator -> the job's id."""
        return self.runpod.run({"pieces": json.dumps(pieces)})

    def given_up(self, job: str) -> dict[str, Any]:
        """What RunPod knows of a job that the SDK is done with."""
        self.says("Finished Job", job)
        return self.runpod.job(job)


@pytest.fixture(scope="module")
def plain() -> Iterator[SimpleNamespace]:
    """Two workers that start side by side, each with a RunPod of its own: `many` jobs at once, and `one`."""
    patient = ("--hold", "5", "--lost-after", "600")  # no job is handed out twice
    with contextlib.ExitStack() as stack:

        def start_one() -> PlainWorker:
            environ = {"RUNPOD_LOG_LEVEL": "INFO", "RUNPOD_PING_INTERVAL": "500"}
            return stack.enter_context(PlainWorker(runpod, 1, "function", **environ))

        runpod_of_many = stack.enter_context(RunPod(*patient))
        runpod_of_many.fault("job-stop", "status", status=404)
        many = stack.enter_context(PlainWorker(runpod_of_many, 8))
        runpod = stack.enter_context(RunPod(*patient))
        yield SimpleNamespace(many=many, one=start_one(), start_one=start_one)


@pytest.fixture(scope="module")
def many(plain: SimpleNamespace) -> PlainWorker:
    """A generator, with the SDK's own level of logging, and no stop channel."""
    worker: PlainWorker = plain.many
    return worker


@pytest.fixture
def one(plain: SimpleNamespace) -> PlainWorker:
    """A function that takes one job after the other, with a heartbeat twice per second."""
    if plain.one.process.poll() is not None:  # a test has ended it
        plain.one = plain.start_one()
    worker: PlainWorker = plain.one
    return worker


@pytest.fixture(scope="module")
def refused(many: PlainWorker) -> Iterator[SimpleNamespace]:
    """A worker that was refused often, and was killed then: its lines about it, and the time of its death."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v2/local/job-take/$ID?gpu=local"
        environ = {"RUNPOD_LOG_LEVEL": "ERROR", "RUNPOD_POD_ID": "killed", "RUNPOD_WEBHOOK_GET_JOB": url}
        with PlainWorker(many.runpod, 8, **environ) as worker:
            lines = worker.says("Failed to get job", times=MANY)
            worker.kill()
            yield SimpleNamespace(lines=lines, runpod=many.runpod, died=time.monotonic())


@pytest.fixture(scope="module")
def sdk() -> Any:
    from supervisor.queue import sdk  # noqa: PLC0415  # 1 s

    return sdk


def gap(times: list[float]) -> float:
    return statistics.median(after - before for before, after in itertools.pairwise(times))


# rp_scale.get_job


def test_it_asks_again_at_once_when_refused(refused: SimpleNamespace) -> None:
    assert gap([at for at, _ in refused.lines]) < AT_ONCE
    assert "ClientConnectorError" in refused.lines[0][1]


@pytest.mark.parametrize("fault", [{"do": "status", "status": 401}, {"do": "empty"}], ids=["401", "204"])
def test_it_asks_again_at_once_after(fault: dict[str, Any], many: PlainWorker) -> None:
    many.runpod.fault("job-take-batch", **fault, times=MANY)
    many.job("ends the poll that is open")
    faults = f"{many.runpod.base}/faults"
    wait_until(lambda: many.runpod.http.get(faults).json()[-1]["acted"] == MANY, f"{MANY} polls", 20)
    polls = [entry["at"] for entry in many.runpod.log("job-take-batch") if entry["fault"] == fault["do"]]
    assert len(polls) == MANY
    assert gap(polls) < AT_ONCE


def test_a_single_job_without_input_is_lost(one: PlainWorker) -> None:
    lost = one.runpod.run({})
    one.says("Failed to get job", "missing field(s)")
    assert one.runpod.done({"answer": "the next one"}) == "the next one"
    assert one.runpod.job(lost)["state"] == "IN_PROGRESS"
    assert one.runpod.job(lost)["posts"] == []


# rp_job.stream_result, rp_job.send_result


def test_a_chunk_that_is_answered_429_is_lost(many: PlainWorker) -> None:
    many.runpod.fault("job-stream", "status", status=429, times=1)
    job = many.job("a", "b", "c")
    assert many.runpod.result(job)["output"] == ["a", "b", "c"]
    assert [chunk["output"] for chunk in many.runpod.job(job)["chunks"]] == ["b", "c"]


def test_a_result_whose_post_is_reset_is_lost(many: PlainWorker) -> None:
    many.runpod.fault("job-done", "reset", times=1)
    job = many.job("a")
    known = many.given_up(job)
    assert (known["state"], known["posts"]) == ("IN_PROGRESS", [])
    assert len([entry for entry in many.runpod.log("job-done") if job in entry["target"]]) == 1


def test_a_lone_surrogate_loses_the_result(many: PlainWorker) -> None:
    known = many.given_up(many.job("a", "\ud83d"))
    assert (known["state"], known["posts"]) == ("IN_PROGRESS", [])
    assert [chunk["output"] for chunk in known["chunks"]] == ["a"]


def test_an_error_object_becomes_a_python_repr(many: PlainWorker) -> None:
    status = many.runpod.result(many.job({"error": {"message": "no", "code": 400}}))
    assert (status["status"], status["error"]) == ("FAILED", "{'message': 'no', 'code': 400}")


def test_only_a_function_gives_an_object_for_a_result(many: PlainWorker, one: PlainWorker) -> None:
    assert many.runpod.result(many.job({"a": 1}))["output"] == [{"a": 1}]
    assert one.runpod.done({"answer": {"a": 1}}) == {"a": 1}


# rp_scale.get_stop_signals


def test_without_a_stop_channel_it_complains_each_second(many: PlainWorker) -> None:
    (first, line), (second, _), *_ = many.says("monitor_stop_signals", times=2)
    assert json.loads(line)["level"] == "ERROR"
    assert second - first < 5


def test_a_job_that_is_queued_can_not_be_stopped(sdk: Any) -> None:
    async def stops() -> bool:
        scaler = sdk.rp_scale.JobScaler({})
        scaler.jobs_queue.put_nowait({"id": "1", "input": {}})
        return bool(await scaler.stop_job("1"))

    assert asyncio.run(stops()) is False


# Taking


def test_a_job_that_waits_to_be_begun_counts_twice(sdk: Any) -> None:
    async def count() -> tuple[int, int]:
        scaler, job = sdk.rp_scale.JobScaler({}), {"id": "waits", "input": {}}
        before = scaler.current_occupancy()
        await scaler.jobs_queue.put(job)
        scaler.job_progress.add(job)  # as get_jobs does it
        try:
            return before, scaler.current_occupancy()
        finally:
            scaler.job_progress.remove(job)

    assert asyncio.run(count()) == (0, 2)


# cpuinfo


def test_its_import_runs_programs(many: PlainWorker) -> None:
    (_, line), *_ = many.says("run by the import")
    assert json.loads(line)["run by the import"]


# What the environment is made safe for


def test_by_default_it_logs_what_it_streams(many: PlainWorker) -> None:
    many.runpod.result(many.job("a secret of the user's"))
    (_, line), *_ = many.says("a secret of the user's")
    assert json.loads(line)["level"] == "DEBUG"


def test_a_short_interval_ends_its_heartbeat(one: PlainWorker) -> None:
    one.says("ValueError", "timeout to 0")
    worker = psutil.Process(one.process.pid)
    wait_until(lambda: {each.status() for each in worker.children()} <= {psutil.STATUS_ZOMBIE}, "the heartbeat's end")
    assert one.runpod.done({"answer": 1}) == 1
    assert one.runpod.log("ping") == []


def test_a_level_that_it_does_not_know_ends_its_import(sdk: Any) -> None:
    with pytest.raises(ValueError, match="Invalid debug level"):  # while the class that is imported is made
        sdk.runpod.serverless.modules.rp_logger._validate_log_level("WARNING")


# os.fork


def test_its_heartbeat_survives_it(refused: SimpleNamespace) -> None:
    def last_ping() -> float:
        ping: dict[str, float] = refused.runpod.worker()["killed"]["ping"] or {"at": 0}
        return ping["at"]

    wait_until(lambda: last_ping() > refused.died + 0.5, "a ping of a worker that is dead")


# rp_scale.JobScaler.run


def test_told_to_end_it_waits_for_its_polls_and_drops_what_they_bring(one: PlainWorker) -> None:
    runpod = one.runpod
    not_taken = runpod.run({})  # see above: by the time of its cancel it is a job of this worker's
    runpod.done({"answer": "ends the poll that is open"})
    asked = time.monotonic()

    def new_poll() -> bool:
        return any(entry["status"] is None and entry["at"] > asked for entry in runpod.log("job-take"))

    wait_until(new_poll, "a poll that is held for 5 s")
    one.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        one.process.wait(1)
    dropped = runpod.run({"answer": "x"})
    wait_until(lambda: runpod.status(dropped)["status"] == "IN_PROGRESS", "the job is taken")
    runpod.http.post(f"{runpod.url}/cancel/{not_taken}")  # ends the poll for stops, too
    assert one.process.wait(15) == 0
    assert runpod.job(dropped)["state"] == "IN_PROGRESS"
    assert runpod.job(dropped)["posts"] == []


# The seams


def test_the_version_is_the_one_that_is_known(sdk: Any) -> None:
    assert re.fullmatch(r"1\.12\.\d+", sdk.runpod.__version__)


def test_seam_of_the_loops(sdk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`JobScaler.start` runs what stands for `run` in the class, on a loop of its own, and ends with it."""
    calls = []

    async def run_instead(scaler: object) -> None:
        calls.append((scaler, asyncio.get_running_loop()))

    assert inspect.iscoroutinefunction(sdk.rp_scale.JobScaler.run)
    monkeypatch.setattr(sdk.rp_scale.JobScaler, "run", run_instead)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    scaler = sdk.rp_scale.JobScaler({"handler": sdk.work})
    scaler.start()
    assert [scaler for scaler, _ in calls] == [scaler]


def test_seam_of_the_session(sdk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has RunPod's key, and as many connections as are wanted."""
    monkeypatch.setenv("RUNPOD_AI_API_KEY", "key")

    async def look() -> None:
        async with sdk.AsyncClientSession() as session:
            assert session.headers["Authorization"] == "key"
            assert session.connector.limit == 0

    asyncio.run(look())


def test_seam_of_the_heartbeat(sdk: Any) -> None:
    """What it tells of is what is in here."""
    progress = sdk.JobsProgress()
    progress.add("1")
    progress.add("2")
    assert set(progress.get_job_list().split(",")) == {"1", "2"}
    progress.remove("1")
    progress.remove("1")
    assert progress.get_job_list() == "2"
    progress.remove("2")
    assert sdk.JobsProgress() is progress
    assert progress.get_job_list() is None


def test_seam_of_the_addresses(sdk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk.rp_job, "JOB_GET_URL", "http://runpod/job-take/w?gpu=x")
    assert sdk.rp_job._job_get_url(1) == "http://runpod/job-take/w?gpu=x&job_in_progress=0"
    assert sdk.rp_job._job_get_url(3) == "http://runpod/job-take-batch/w?gpu=x&batch_size=3&job_in_progress=0"
    assert sdk.rp_job._job_stop_url() == "http://runpod/job-stop/w?gpu=x"
    monkeypatch.setattr(sdk.rp_job, "JOB_GET_URL", "http://runpod/job-take/w")  # the Hub's tests
    assert sdk.rp_job._job_get_url(1) == "http://runpod/job-take/w&job_in_progress=0"
    assert isinstance(sdk.rp_http.JOB_DONE_URL, str)
    assert isinstance(sdk.rp_http.JOB_STREAM_URL, str)


def test_seam_of_the_log(sdk: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose lines `queue/child.py` reads."""
    log = sdk.runpod.serverless.modules.rp_logger.RunPodLogger()
    monkeypatch.setattr(type(log), "level", "INFO")
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "x")
    for level in ("info", "warn", "error"):
        getattr(log, level)(level, "job")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [{"requestId": "job", "message": each, "level": each.upper()} for each in ("info", "warn", "error")]
