"""The real SDK against the simulated RunPod, over the fake vLLM: what reaches RunPod, and what does not get lost."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from supervisor.gateway.counts import OUTCOMES
from tests.engine.test_metrics import Scrape
from tests.harness import ROOT, Supervisor, have_ended, wait_until
from tests.queue.conftest import RunPod, in_queue_mode, joined

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def faulty(body: dict[str, object] | None = None, **fault: object) -> dict[str, object]:
    """A streamed chat request that the fake treats as `fault` says."""
    return {
        "route": CHAT,
        "body": {**HELLO, "stream": True, **(body or {})},
        "headers": {"X-Fake": json.dumps(fault)},
    }


def text_of(output: list[str]) -> str:
    assert all(isinstance(piece, str) for piece in output), output
    return "".join(output)


def timeless(text: str) -> str:
    return re.sub(r'"(id|created)":("[^"]*"|\d+)', "", text)


def running(supervisor: Supervisor) -> int:
    return int(supervisor.client.get("/fake/state").json()["running"])


def direct(supervisor: Supervisor, job: dict[str, Any]) -> str:
    """What the gateway answers to the same request."""
    answer = supervisor.client.post(job["route"], json=job["body"], headers=job["headers"])
    assert answer.status_code == 200
    return answer.text


# On the wire


def test_takes_stops_and_pings(endpoint: Supervisor, runpod: RunPod) -> None:
    takes = runpod.log("job-take-batch")
    assert "/job-take-batch/local?gpu=local&batch_size=30&job_in_progress=0" in takes[0]["target"]
    assert takes[0]["headers"]["authorization"] == "local"  # the key as it is, without `Bearer`
    assert takes[0]["headers"]["user-agent"].startswith("RunPod-Python-SDK/1.12")
    wait_until(lambda: runpod.log("job-stop"), "the stop channel's poll")
    job = runpod.run(faulty({"max_tokens": 400}, token_interval=0.01))
    wait_until(lambda: any(job in ping["target"] for ping in runpod.log("ping")), "a ping that names the job")
    runpod.result(job)


def test_a_stream_arrives_byte_for_byte(endpoint: Supervisor, runpod: RunPod) -> None:
    content = faulty({"max_tokens": 40}, split_utf8=True, token_interval=0.005)
    job = runpod.run(content)
    output = runpod.result(job)["output"]
    assert timeless(text_of(output)) == timeless(direct(endpoint, content))
    assert output[0].count("\n\n") == 1  # the first event at once, by itself
    assert all(piece.endswith("\n\n") for piece in output)
    known = runpod.job(job)
    assert len(output) == len(known["chunks"]) <= 20  # 42 events
    assert [post["isStream"] for post in known["posts"]] == [True]
    posts = [entry for entry in runpod.log("job-stream") if job in entry["target"]]
    assert all("isStream=false" in post["target"] for post in posts)
    assert all(post["headers"]["content-type"] == "application/x-www-form-urlencoded" for post in posts)


def test_a_whole_answer_is_one_object_in_a_list(endpoint: Supervisor, runpod: RunPod) -> None:
    (answer,) = runpod.done({**HELLO, "max_tokens": 3})
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m"


def test_an_answer_in_runpod_llms_shape_is_the_object_itself(endpoint: Supervisor, runpod: RunPod) -> None:
    job = runpod.run({"mode": "chat", **HELLO})
    output = runpod.result(job)["output"]
    assert output["mode"] == "chat"
    assert output["usage"]["completion_tokens"] == 512
    known = runpod.job(job)
    assert [post["isStream"] for post in known["posts"]] == [False]
    assert known["chunks"] == []


def test_a_batch(endpoint: Supervisor, runpod: RunPod) -> None:
    items = [
        {"mode": "chat", **HELLO, "max_tokens": 2},
        {"mode": "complete", "prompt": "hi", "max_tokens": 2},
        {"mode": "nonsense", **HELLO},
        {"mode": "chat", **HELLO, "model": "other"},
        {"openai_route": CHAT, "openai_input": {**HELLO, "stream": True}},
    ]
    output = runpod.done({"requests": items})
    assert (output["model"], output["count"]) == ("m", 5)
    first, second, third, fourth, fifth = output["results"]
    assert first["choices"][0]["message"]["role"] == "assistant"
    assert second["choices"][0]["text"]
    assert "nonsense" in third["error"]
    assert (third["status"], third["type"]) == (400, "invalid_request_error")
    assert "other" in fourth["error"]
    assert fourth["status"] == 404
    assert fifth["object"] == "chat.completion"


def test_binary_in_and_out(endpoint: Supervisor, runpod: RunPod) -> None:
    raw = bytes(range(256))
    body = {"content_type": "application/octet-stream", "base64": base64.b64encode(raw).decode()}
    (seen,) = runpod.done({"route": "/fake/echo", "body": body, "method": "PUT", "query": {"a": "b c"}})
    assert (seen["method"], seen["target"], seen["body_len"]) == ("PUT", "/fake/echo?a=b+c", 256)
    (out,) = runpod.done({"route": "/fake/bytes?n=300"})
    assert len(base64.b64decode(out["base64"])) == 300
    assert out["content_type"] == "application/octet-stream"
    (form,) = runpod.done({"route": "/fake/echo", "files": {"file": {"base64": body["base64"], "filename": "a.wav"}}})
    assert dict(form["headers"])["Content-Type"].startswith("multipart/form-data; boundary=")


def test_an_answer_above_the_limit_of_a_chunk_is_in_the_result(endpoint: Supervisor, runpod: RunPod) -> None:
    (out,) = runpod.done({"route": "/fake/bytes?n=3000000"})
    assert len(base64.b64decode(out["base64"])) == 3_000_000


def test_a_result_that_runpod_refuses_becomes_an_error(endpoint: Supervisor, runpod: RunPod) -> None:
    runpod.done(HELLO)  # the first one's would be sent again without its metadata
    runpod.fault("job-done", "status", status=413, times=1)
    error = runpod.failed(HELLO)
    assert "RunPod did not take the result (RunPod answers 413)" in error["message"]


def test_no_more_jobs_are_taken_than_may_run(endpoint: Supervisor, runpod: RunPod) -> None:
    slow = {"route": CHAT, "body": HELLO, "headers": {"X-Fake": json.dumps({"prefill_seconds": 60})}}
    jobs = [runpod.run(slow) for _ in range(34)]

    def states() -> list[str]:
        return [runpod.status(job)["status"] for job in jobs]

    wait_until(lambda: states().count("IN_PROGRESS") >= 30, "thirty at once")
    wait_until(lambda: "job_in_progress=1" in runpod.log("job-take-batch")[-1]["target"], "the takes of these")
    assert states() == ["IN_PROGRESS"] * 30 + ["IN_QUEUE"] * 4
    for job in reversed(jobs):
        runpod.http.post(f"{runpod.url}/cancel/{job}")
    assert runpod.done({**HELLO, "max_tokens": 1})
    wait_until(lambda: running(endpoint) == 0, "the generations' end")


# Errors


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ({}, 400, "input must be an object"),
        ({"nonsense": 1}, 400, "an object with one of: openai_route"),
        ("text", 400, "input must be an object"),
        ({"messages": []}, 400, "messages is empty"),
        ({"openai_route": "no path"}, 400, "must be a path"),
        ({**HELLO, "model": "other"}, 404, "other"),
        ({"openai_route": CHAT, "openai_input": {**HELLO, "model": "other", "stream": True}}, 404, "other"),
        ({"route": "/v1/models/nowhere/at/all"}, 404, "no route /v1/models/nowhere/at/all: it is for another task"),
        ({"route": "/nowhere"}, 404, "There is no route /nowhere here."),
        ({"route": "/sleep", "body": {"level": 1}}, 403, "needs an admin key"),  # no job is an administrator
        ({"route": "/status"}, 403, "/status is the supervisor's own"),
        ({"openai_route": "//st%61tus/?x"}, 403, "/status is the supervisor's own"),
        ({"prompt": "x " * 2_500_000}, 400, "maximum context length"),
        ({**HELLO, "max_tokens": -1}, 400, "max_tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_are_json_with_the_status(
    endpoint: Supervisor, runpod: RunPod, content: object, status: int, words: str
) -> None:
    error = runpod.failed(content)
    assert error["status"] == status
    assert words in error["message"]
    assert error["type"]
    assert "Traceback" not in str(error)
    assert "/main/" not in str(error)


def raw(*parts: bytes, close: object = True) -> dict[str, object]:
    """A request to which the fake answers these bytes, each part so that it is read alone."""
    script = {"parts": [{"b64": base64.b64encode(part).decode(), "delay": 0.02} for part in parts], "close": close}
    return {"route": "/fake/raw", "body": script}


def answer(body: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body) if length is None else length) + body


def test_what_is_no_proper_answer(endpoint: Supervisor, runpod: RunPod) -> None:
    """A worker that does not understand says so; the job is not done as if it had."""
    pieces = answer(b'{"error": {"message": "in two pieces", "type": "Odd", "code": 418}}', b"418 Teapot")
    error = runpod.failed(raw(pieces[:-20], pieces[-20:]))
    assert (error["message"], error["type"], error["status"]) == ("in two pieces", "Odd", 418)
    assert "in the middle" in runpod.failed(raw(answer(b'{"x":', length=100)))["message"]
    assert "no JSON" in runpod.failed(raw(answer(b"{")))["message"]
    assert "RecursionError" in runpod.failed(raw(answer(b"[" * 100_000)))["message"]
    assert runpod.done(raw(answer(b'{"x": NaN}'))) == [{"x": None}]
    broken = raw(answer(b'{"x":', length=100))
    output = runpod.done({"requests": [broken, {"mode": "chat", **HELLO, "max_tokens": 1}]})
    assert "in the middle" in output["results"][0]["error"]
    assert output["results"][1]["choices"]


def test_lone_surrogates_go_in_and_come_out(endpoint: Supervisor, runpod: RunPod) -> None:
    lone = '{"input": {"route": "/fake/echo", "body": {"x": "\\ud83d"}}}'
    sent = runpod.http.post(f"{runpod.url}/run", content=lone)
    assert runpod.result(sent.json()["id"])["status"] == "COMPLETED"
    (out,) = runpod.done(raw(answer(b'{"x": "a\\ud83d" }')))
    assert out["x"].startswith("a")


@pytest.mark.slow
def test_a_result_above_runpods_limit_is_an_error_and_not_a_lost_job(endpoint: Supervisor, runpod: RunPod) -> None:
    error = runpod.failed({"route": "/fake/bytes?n=11000000"})
    assert (error["status"], error["type"]) == (413, "result_too_large")
    assert "10 MB" in error["message"]
    error = runpod.failed({"route": "/fake/bytes?n=20000000&interval=0.001&type=text/event-stream"}, seconds=60)
    assert "10 MB" in error["message"]


# Cancelled and expired


def test_a_cancelled_job_stops_the_generation(endpoint: Supervisor, runpod: RunPod) -> None:
    job = runpod.run(faulty({"max_tokens": 5000}, token_interval=0.01))
    wait_until(lambda: len(runpod.job(job)["chunks"]) >= 2, "a stream under way")
    assert running(endpoint) == 1
    runpod.http.post(f"{runpod.url}/cancel/{job}")
    wait_until(lambda: running(endpoint) == 0, "the generation's end", 1)
    assert runpod.job(job)["posts"] == []


def test_a_job_cancelled_while_its_chunk_is_being_posted(endpoint: Supervisor, runpod: RunPod) -> None:
    runpod.fault("job-stream", "delay", seconds=30, times=1)
    job = runpod.run(faulty({"max_tokens": 5000}, token_interval=0.01))
    wait_until(lambda: running(endpoint) == 1, "the generation")
    wait_until(lambda: [entry for entry in runpod.log("job-stream") if job in entry["target"]], "the POST")
    runpod.http.post(f"{runpod.url}/cancel/{job}")
    wait_until(lambda: running(endpoint) == 0, "the generation's end", 1)


@pytest.mark.slow
def test_an_expired_job_stops_the_generation(endpoint: Supervisor, runpod: RunPod) -> None:
    job = runpod.run(faulty({"max_tokens": 5000}, token_interval=0.01), policy={"executionTimeout": 5000})
    wait_until(lambda: running(endpoint) == 1, "the generation")
    wait_until(lambda: runpod.status(job)["status"] == "TIMED_OUT", "the time limit")
    wait_until(lambda: running(endpoint) == 0, "the generation's end", 1)


# RunPod's side fails


@pytest.mark.parametrize(
    "fault",
    [
        {"do": "status", "status": 429},
        {"do": "status", "status": 500},
        {"do": "reset"},
        {"do": "accept-reset"},
    ],
    ids=lambda fault: str(fault.get("status", fault["do"])),
)
def test_no_chunk_and_no_result_is_lost_or_doubled(
    endpoint: Supervisor, runpod: RunPod, fault: dict[str, object]
) -> None:
    content = faulty({"max_tokens": 30}, token_interval=0.005)
    runpod.fault("job-stream", times=2, after=1, **fault)  # type: ignore[arg-type]
    runpod.fault("job-done", times=2, **fault)  # type: ignore[arg-type]
    job = runpod.run(content)
    status = runpod.result(job)
    assert status["status"] == "COMPLETED"
    assert timeless(text_of(status["output"])) == timeless(direct(endpoint, content))
    known = runpod.job(job)
    assert len(known["chunks"]) == len(status["output"])
    # Taken, but not confirmed: it came twice, and was known by its key.
    assert (known["duplicates"] > 0) == (fault["do"] == "accept-reset")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [  # each waits for seconds, as the worker has to
        {"do": "status", "status": 401},
        pytest.param({"do": "empty"}, marks=pytest.mark.slow),
        pytest.param({"do": "reset"}, marks=pytest.mark.slow),
    ],
    ids=lambda fault: str(fault.get("status", fault["do"])),
)
def test_polling_never_spins(endpoint: Supervisor, runpod: RunPod, fault: dict[str, object]) -> None:
    runpod.fault("*", times=None, **fault)  # type: ignore[arg-type]
    start = len(runpod.log("job-take-batch"))
    runpod.run(HELLO)  # ends the poll that is open
    wait_until(lambda: len(runpod.log("job-take-batch")) > start + 5, "some polls")
    polls = [entry["at"] for entry in runpod.log("job-take-batch")][start + 1 :]
    assert polls[4] - polls[0] > 0.25  # 0.1, 0.2, 0.4 s ...; each twice where aiohttp tries again by itself
    runpod.no_faults()
    assert runpod.done(HELLO, 30)


# The engine's life


def test_a_crash_with_jobs_under_way(endpoint: Supervisor, runpod: RunPod) -> None:
    """A job of whose answer nothing had come is done by the next engine; a stream that had begun says that it broke."""
    stream = runpod.run(faulty({"max_tokens": 5000}, token_interval=0.01))
    whole = runpod.run({"route": CHAT, "body": HELLO, "headers": {"X-Fake": json.dumps({"prefill_seconds": 1})}})
    wait_until(lambda: running(endpoint) == 2 and runpod.job(stream)["chunks"], "both")
    os.kill(endpoint.client.get("/fake/state").json()["engine_pid"], signal.SIGKILL)
    assert runpod.result(whole)["status"] == "COMPLETED"
    cut = runpod.result(stream)
    assert cut["status"] == "FAILED"
    assert json.loads(cut["error"])["status"] in (500, 503)  # vLLM's own word for it, or ours
    output = text_of([chunk["output"] for chunk in runpod.job(stream)["chunks"]])
    assert output.endswith("data: [DONE]\n\n")
    assert '"error"' in output
    assert endpoint.client.get("/status").json()["mode"] == "queue"


@pytest.mark.slow  # four crashes, and as many starts
def test_a_stream_that_the_engine_breaks_off_is_failed_everywhere() -> None:
    """It was COMPLETED, with half a text: nobody who does not read the events would have known."""
    faults: list[dict[str, object]] = [
        {"die_after_tokens": 3, "how": "engine"}, {"die_after_tokens": 3, "how": "api"},
        {"die_after_tokens": 3, "how": "exit:0"}, {"freeze_after_tokens": 3},
    ]  # fmt: skip
    environ = {"SUPERVISOR_STALL_TIMEOUT": "1"}
    with RunPod("--hold", "2") as runpod, in_queue_mode(runpod, environ=environ) as supervisor:
        for number, fault in enumerate(faults, 1):
            wait_until(lambda: supervisor.client.get("/ping").status_code == 200, "an engine", 20)
            job = runpod.run(faulty({"max_tokens": 30}, token_interval=0.05, **fault))
            status = runpod.result(job)
            assert status["status"] == "FAILED", fault
            assert json.loads(status["error"])["status"] in (500, 503), fault
            streamed = text_of([chunk["output"] for chunk in runpod.job(job)["chunks"]])
            assert streamed.count("data: ") >= 4, fault
            assert '"error"' in streamed, fault
            assert streamed.endswith("data: [DONE]\n\n"), fault
            supervisor.says(rf"job failed after .*: 50\d, .* \(request {job}\)")
            assert Scrape(supervisor)("supervisor_jobs_total", outcome="failed") == number  # the log is told after it
        assert Scrape(supervisor)("supervisor_jobs_total") == len(faults)


@pytest.mark.slow  # 200 jobs and a crash
def test_of_two_hundred_jobs_each_ends_as_it_should() -> None:
    """Every tenth is cancelled, and every tenth streams when its engine is killed."""
    environ = {"SUPERVISOR_MAX_CONCURRENCY": "200"}
    with RunPod("--hold", "2") as runpod, in_queue_mode(runpod, environ=environ) as supervisor:
        supervisor.ready()
        stream = faulty({"max_tokens": 3000}, token_interval=0.05)
        whole = {"route": CHAT, "body": {**HELLO, "max_tokens": 40}, "headers": stream["headers"]}
        kinds = ["CANCELLED", "FAILED", *["COMPLETED"] * 8] * 20
        jobs = {runpod.run(whole if kind == "COMPLETED" else stream): kind for kind in kinds}
        streams = [job for job, kind in jobs.items() if kind != "COMPLETED"]
        wait_until(lambda: all(runpod.job(job)["chunks"] for job in streams), "all streams", 30)
        for job in (job for job in streams if jobs[job] == "CANCELLED"):
            runpod.http.post(f"{runpod.url}/cancel/{job}")
        wait_until(lambda: Scrape(supervisor)("supervisor_jobs_total", outcome="cancelled") == 20, "20 to be cancelled")
        os.kill(supervisor.client.get("/fake/state").json()["engine_pid"], signal.SIGKILL)
        assert {job: runpod.result(job, 60)["status"] for job in jobs} == jobs
        wait_until(lambda: Scrape(supervisor)("supervisor_jobs_total") == len(jobs), "all to be counted")
        scrape = Scrape(supervisor)
        counted = {"completed": 160, "failed": 20, "cancelled": 20, "lost": 0, "undelivered": 0}
        assert {each: scrape("supervisor_jobs_total", outcome=each) for each in OUTCOMES} == counted
        wait_until(lambda: running(supervisor) == 0, "an idle engine")


@pytest.mark.slow  # waits for two pings, a start of five seconds, and an open poll
def test_nothing_is_taken_while_it_restarts_and_pings_go_on() -> None:
    with RunPod("--hold", "2") as runpod:
        plan = [{}, {"load_seconds": 5}]
        environ = {"FAKE_VLLM_COUNT": f"/tmp/fake-count-{os.getpid()}"}
        with in_queue_mode(runpod, plan=plan, environ=environ) as supervisor:
            supervisor.ready()
            joined(runpod)
            os.kill(supervisor.client.get("/fake/state").json()["engine_pid"], signal.SIGKILL)
            supervisor.says("ready -> restarting")
            pings = len(runpod.log("ping"))
            wait_until(lambda: len(runpod.log("ping")) > pings, "a ping: the open poll is closed long since")
            takes = len(runpod.log("job-take-batch"))
            job = runpod.run(HELLO)
            wait_until(lambda: len(runpod.log("ping")) > pings + 1, "another one")
            assert runpod.status(job)["status"] == "IN_QUEUE"
            assert len(runpod.log("job-take-batch")) == takes
            assert supervisor.output.count("starting -> ready") == 1
            assert runpod.result(job)["status"] == "COMPLETED"
        os.unlink(environ["FAKE_VLLM_COUNT"])


@pytest.mark.slow
def test_an_engine_that_failed_for_good_tells_each_job_why() -> None:
    with RunPod("--hold", "2") as runpod:
        line = "ValueError: No available memory for the cache blocks."
        plan = [{"die_at_start": {"log": [line], "code": 1}}]
        with in_queue_mode(runpod, plan=plan) as supervisor:
            supervisor.says("restarting -> failed")
            error = runpod.failed(HELLO)
            assert error["status"] == 503
            assert "no memory left for the KV cache" in error["message"]
            assert "GPU_MEMORY_UTILIZATION" in error["message"]
            assert runpod.failed(faulty())["status"] == 503
            batch = runpod.failed({"requests": [HELLO, HELLO]})  # the same for all of them
            assert (batch["status"], batch["message"]) == (503, error["message"])
            supervisor.signal(signal.SIGTERM)
            assert supervisor.exit_code() == 3


# The end


def the_worker(supervisor: Supervisor) -> psutil.Process:
    (found,) = [
        child
        for child in psutil.Process(supervisor.process.pid).children()
        if "supervisor.queue.sdk" in child.cmdline()
    ]
    return found


@pytest.mark.slow
def test_sigterm_lets_jobs_finish_and_reports_those_that_do_not() -> None:
    with (
        RunPod("--hold", "60") as runpod,
        in_queue_mode(runpod, environ={"SUPERVISOR_DRAIN_TIMEOUT": "6"}) as supervisor,
    ):
        supervisor.ready()
        short = [runpod.run(faulty({"max_tokens": 100}, token_interval=0.01)) for _ in range(8)]
        stream = runpod.run(faulty({"max_tokens": 30_000}, token_interval=0.01))
        whole = runpod.run({"route": CHAT, "body": HELLO, "headers": {"X-Fake": json.dumps({"prefill_seconds": 60})}})
        wait_until(lambda: all(runpod.job(job)["chunks"] for job in [*short, stream]), "nine streams")
        wait_until(lambda: running(supervisor) == 10, "and one without")
        expected = timeless(direct(supervisor, faulty({"max_tokens": 100})))
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code() == 0
        for job in short:
            assert timeless(text_of(runpod.status(job)["output"])) == expected
        for job in (stream, whole):
            status = runpod.status(job)
            assert status["status"] == "FAILED"
            assert "SUPERVISOR_DRAIN_TIMEOUT" in json.loads(status["error"])["message"]


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_it_leaves_with_its_last_job_whatever_poll_is_open(again: bool) -> None:
    """The poll for stops was opened anew each second, and then waited for: 20 s of a GPU at each scale-down. A second
    signal ends what still runs."""
    with RunPod("--hold", "60") as runpod, in_queue_mode(runpod) as supervisor:
        supervisor.ready()
        joined(runpod)
        job = runpod.run(faulty({"max_tokens": 5000 if again else 30}, token_interval=0.1))
        wait_until(lambda: runpod.job(job)["chunks"], "the stream")
        supervisor.signal(signal.SIGTERM)
        supervisor.says("ready -> draining")
        if again:
            supervisor.signal(signal.SIGTERM)
        assert runpod.result(job)["status"] == ("FAILED" if again else "COMPLETED")
        over = time.monotonic()
        assert supervisor.exit_code() == (128 + signal.SIGTERM if again else 0)
        assert time.monotonic() - over < 5  # 1 s of it ours; of the poll it were 55
        assert [entry for entry in runpod.log("job-stop") if entry["status"] is None]  # it was open


@pytest.mark.slow
def test_sigterm_while_it_loads() -> None:
    with RunPod("--hold", "60") as runpod, in_queue_mode(runpod, plan=[{"load_seconds": 60}]) as supervisor:
        worker = wait_until(lambda: [the_worker(supervisor)] if supervisor.engine() else [], "the worker")
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code() == 0
        assert have_ended(*worker)
        assert runpod.log("job-take-batch") == []  # it had not joined


@pytest.mark.slow  # until RunPod gives a job out again
def test_a_worker_that_is_killed_is_started_again_and_its_heartbeat_dies_with_it() -> None:
    with RunPod("--hold", "2", "--lost-after", "3") as runpod, in_queue_mode(runpod) as supervisor:
        supervisor.ready()
        joined(runpod)
        worker = the_worker(supervisor)
        (heartbeat,) = worker.children()
        job = runpod.run(faulty({"max_tokens": 300}, token_interval=0.01))
        wait_until(lambda: running(supervisor) == 1, "the generation")
        worker.kill()
        wait_until(lambda: have_ended(*[worker, heartbeat]), "the heartbeat's end", 2)
        wait_until(lambda: running(supervisor) == 0, "the generation's end")
        supervisor.says(r"the queue worker ended \(killed by SIGKILL\)")
        scrape = Scrape(supervisor)
        assert scrape("supervisor_queue_worker_deaths_total") == scrape("supervisor_jobs_total", outcome="lost") == 1
        assert 0 < scrape("supervisor_job_seconds_sum", outcome="lost") < 20
        assert scrape("supervisor_jobs_total") == 1
        assert scrape("supervisor_jobs_running") == 0
        # A first result of a worker's has more than RunPod's API knows. Should that be refused: without.
        runpod.fault("job-done", "status", status=400, times=1)
        status = runpod.result(job, 30)
        assert status["status"] == "COMPLETED"  # RunPod gave it out again
        assert "data: [DONE]" in text_of(status["output"])
        assert "metadata" not in status
        refused = {"kind": "result", "result": "refused"}
        wait_until(lambda: Scrape(supervisor)("supervisor_jobs_total", outcome="completed") == 1, "its count")
        assert Scrape(supervisor)("supervisor_job_posts_total", **refused) == 1
        children = psutil.Process(supervisor.process.pid).children()
        assert not [child for child in children if child.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_killed_supervisor_takes_the_worker_along() -> None:
    with RunPod("--hold", "60") as runpod, in_queue_mode(runpod) as supervisor:
        supervisor.ready().engine()
        joined(runpod)
        worker = the_worker(supervisor)
        family = [worker, *worker.children()]
        job = runpod.run(faulty({"max_tokens": 5000}, token_interval=0.01))
        wait_until(lambda: runpod.job(job)["chunks"], "the stream")
        supervisor.signal(signal.SIGKILL)
        assert runpod.result(job)["status"] == "FAILED"  # and is not left to RunPod's patience
        wait_until(lambda: have_ended(*family), "the worker's end")


# Around it


def test_each_job_has_a_line_of_log_and_nothing_of_its_content_is_in_it(endpoint: Supervisor, runpod: RunPod) -> None:
    prompt = "a sentence that nobody else writes"
    job = runpod.run({"prompt": prompt, "stream": True, "max_tokens": 20})
    text = text_of(runpod.result(job)["output"])
    bad = runpod.run({"prompt": prompt, "max_tokens": -1})
    runpod.result(bad)
    done = rf"supervisor: job completed after [\d.]+ s, first bytes after [\d.]+ s, \d+ POSTs \(request {job}\)"
    wait_until(lambda: re.search(done, endpoint.output), "the first job's line")
    failed = rf"supervisor WARNING: job failed after [\d.]+ s, 1 POST: 400, BadRequestError \(request {bad}\)"
    wait_until(lambda: re.search(failed, endpoint.output), "the second job's line")
    assert prompt not in endpoint.output
    assert "Füße" in text
    assert "Füße" not in endpoint.output


def posts(runpod: RunPod) -> dict[tuple[str, str], int]:
    """What workers have posted and how it ended, by the simulator's log, in the words of our own series."""
    found = {(kind, result): 0 for kind in ("chunk", "result") for result in ("taken", "refused", "failed")}
    for kind, what in (("chunk", "job-stream"), ("result", "job-done")):
        for entry in runpod.log(what):
            status = entry["status"] if entry["fault"] != "accept-reset" else None
            found[kind, "taken" if status == 200 else "refused" if status in (400, 403) else "failed"] += 1
    return found


@pytest.mark.slow
def test_jobs_and_posts_are_counted_as_runpod_saw_them() -> None:
    with RunPod("--hold", "2") as runpod, in_queue_mode(runpod) as supervisor:
        first = runpod.result(runpod.run({**HELLO, "max_tokens": 2}), 30)
        start = first["metadata"]["cold_start"]
        assert {"importing vLLM"} <= {row["name"] for row in start["phases"]}
        assert start["seconds"] == pytest.approx(sum(row["seconds"] for row in start["phases"]), abs=0.01)
        assert "metadata" not in runpod.result(runpod.run({**HELLO, "max_tokens": 2}))

        runpod.fault("job-stream", "status", status=500, times=1, after=1)
        runpod.fault("job-stream", "reset", times=1, after=1)
        runpod.fault("job-done", "accept-reset", times=1)
        job = runpod.run(faulty({"max_tokens": 30}, token_interval=0.01))
        assert "data: [DONE]" in text_of(runpod.result(job)["output"])
        runpod.fault("job-done", "status", status=429, times=2)
        runpod.failed({**HELLO, "max_tokens": -1})

        job = runpod.run(faulty(prefill_seconds=60))  # a POST that a cancel cuts short has no end to be counted
        wait_until(lambda: running(supervisor) == 1, "the job that runs")
        wait_until(lambda: Scrape(supervisor)("supervisor_jobs_running") == 1, "this one alone to run")
        runpod.http.post(f"{runpod.url}/cancel/{job}")
        wait_until(lambda: Scrape(supervisor)("supervisor_jobs_running") == 0, "its end")

        runpod.fault("job-done", "status", status=403)
        began = len(runpod.log("job-done"))
        runpod.run({**HELLO, "max_tokens": 2})
        undelivered = {"outcome": "undelivered"}
        wait_until(lambda: Scrape(supervisor)("supervisor_jobs_total", **undelivered) == 1, "a result that is lost")
        assert len(runpod.log("job-done")) == began + 2  # and an error in its stead
        runpod.no_faults()

        scrape = Scrape(supervisor)
        ended = {outcome: scrape("supervisor_jobs_total", outcome=outcome) for outcome in OUTCOMES}
        assert ended == {"completed": 3, "failed": 1, "cancelled": 1, "undelivered": 1, "lost": 0}
        assert ended == {each: scrape("supervisor_job_seconds_count", outcome=each) for each in OUTCOMES}
        assert 0.25 < scrape("supervisor_job_seconds_sum", outcome="completed") < 30
        seen = posts(runpod)
        assert seen["chunk", "failed"] == 2
        assert seen["result", "failed"] == 3
        counted = {key: scrape("supervisor_job_posts_total", kind=key[0], result=key[1]) for key in seen}
        assert counted == seen


@pytest.mark.slow
def test_the_hubs_test_runner() -> None:
    """It gives an address without a query, no stream, no ping, and has port 80 for itself. Then, with nothing to do,
    SIGTERM: no open poll is waited for, and no job is taken."""
    with RunPod("--hold", "60") as runpod:
        environ = {
            "RUNPOD_POD_ID": "w1",
            "RUNPOD_WEBHOOK_GET_JOB": f"{runpod.url}/job-take/$RUNPOD_POD_ID",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{runpod.url}/job-done/$RUNPOD_POD_ID/$ID",
            "SUPERVISOR_VLLM": str(ROOT / "scripts" / "fake_vllm"),
        }
        environ |= {"MODEL": "m", "PORT": ""}
        with Supervisor(program=(sys.executable, ROOT / "handler.py"), environ=environ) as supervisor:
            supervisor.says("ready: up to 30 of RunPod's jobs at once")
            (answer,) = runpod.done({**HELLO, "max_tokens": 3})
            assert answer["object"] == "chat.completion"
            assert "data: [DONE]" in text_of(runpod.done(faulty()))
            connections = psutil.Process(supervisor.process.pid).net_connections("tcp")
            assert not [one for one in connections if one.status == psutil.CONN_LISTEN]
            worker = the_worker(supervisor)
            wait_until(lambda: runpod.log("job-stop"), "the stop channel's poll")
            supervisor.signal(signal.SIGTERM)
            assert supervisor.exit_code(8) == 0
            assert have_ended(*[worker])
            assert runpod.status(runpod.run(HELLO))["status"] == "IN_QUEUE"


HUB = json.loads((ROOT / ".runpod" / "tests.json").read_text())["tests"]


@pytest.mark.parametrize("test", HUB, ids=[test["name"] for test in HUB])
def test_what_the_hub_would_ask(endpoint: Supervisor, runpod: RunPod, test: dict[str, Any]) -> None:
    assert runpod.done(test["input"])


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_machine_without_its_gpus_is_reported_and_left(form: str) -> None:
    environ = {"RUNPOD_GPU_COUNT": "99", "SUPERVISOR_LOG_FORMAT": form}
    with RunPod() as runpod, in_queue_mode(runpod, environ=environ) as supervisor:
        assert supervisor.exit_code() == 3
        assert "this machine is not fit (gpu): RunPod gave 99 GPUs" in supervisor.output
        assert form == "text" or json.loads(supervisor.output)["requestId"] is None
        assert "importing vLLM" not in supervisor.output
        (ping,) = runpod.log("ping")
        assert "status=unhealthy&check=gpu&reason=RunPod+gave+99+GPUs" in ping["target"]


BAD = {
    "a long number": '{"input": {"prompt": "a", "seed": ' + "9" * 5000 + "}}",
    "a longer one": '{"input": {"prompt": [' + "9" * 50_000 + "]}}",
}


def test_a_job_that_can_not_be_read_fails_and_harms_no_other(endpoint: Supervisor, runpod: RunPod) -> None:
    """Taken at once: the whole take was lost, without a word of any of them."""
    runpod.fault("job-take-batch", "delay", seconds=0.5, times=1)  # so that they wait for one take
    first = runpod.run({**HELLO, "max_tokens": 2})
    bad = {
        why: runpod.http.post(f"{runpod.url}/run", content=body, headers={"Content-Type": "application/json"})
        for why, body in BAD.items()
    }
    last = runpod.run({**HELLO, "max_tokens": 2})
    for job in (first, last):
        assert runpod.result(job)["status"] == "COMPLETED"
    for why, answer in bad.items():
        status = runpod.result(answer.json()["id"])
        assert status["status"] == "FAILED", why
        assert json.loads(status["error"])["status"] == 400
    endpoint.says("2 POSTs|1 POST")


@pytest.mark.slow
def test_a_simulated_runpod_that_dies_is_started_again() -> None:
    with Supervisor("m", "--mode", "queue") as supervisor:
        url = supervisor.says(r"ready: a simulated RunPod endpoint, (http://\S+)", 20)[1]
        (simulator,) = [
            child
            for child in psutil.Process(supervisor.process.pid).children()
            if "supervisor.local_runpod.simulator" in child.cmdline()
        ]
        simulator.kill()
        supervisor.says(r"the simulated RunPod ended \(killed by SIGKILL\), its jobs are lost: again in 0.5 s")
        job = httpx.post(
            f"{url}/runsync", json={"input": {**HELLO, "max_tokens": 2}}, timeout=30
        )  # and waits meanwhile
        assert job.json()["status"] == "COMPLETED"
        children = psutil.Process(supervisor.process.pid).children()
        assert not [child for child in children if child.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_simulated_runpod_is_for_this_machine_and_asks_for_the_keys_that_there_are() -> None:
    environ = {"SUPERVISOR_HOST": "0.0.0.0", "SUPERVISOR_API_KEYS": "key-of-a-client"}
    with Supervisor("m", "--mode", "queue", environ=environ) as supervisor:
        said = supervisor.says(
            r"ready: a simulated RunPod endpoint, (http://127.0.0.1:\d+/v2/local)\n  (curl .+)\n", 20
        )
        base = said[1].removesuffix("/v2/local")
        for path in ("/v2/local/health", "/log", "/workers", "/v2/local/job-take/local", "/v2/local//job-take/local"):
            assert httpx.get(base + path).status_code == 401
        for path in ("/v2/local/run", "/faults", "/v2/local/job-done/local/1"):
            assert httpx.post(base + path, json={}).status_code == 401
        pasted = subprocess.run(
            ["bash", "-c", said[2]], capture_output=True, text=True, timeout=60, check=True,
            env={**os.environ, "KEY": "key-of-a-client"},
        )  # fmt: skip
        assert json.loads(pasted.stdout)["status"] == "COMPLETED"
        command = [sys.executable, "-m", "supervisor", "job", json.dumps(HELLO), "--url", base]
        asks = partial(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
        sent = asks(env={**os.environ, **environ})
        assert (sent.returncode, sent.stderr) == (0, "")
        without = asks()
        assert without.returncode == 1
        assert "SUPERVISOR_API_KEYS" in without.stderr


@pytest.mark.slow
def test_keys_that_are_read_again_are_the_simulated_runpods_too(tmp_path: Path) -> None:
    """For the one that runs, and for the one after it."""
    (keys := tmp_path / "keys").write_text("the-old-key\n")
    with Supervisor("m", "--mode", "queue", environ={"SUPERVISOR_API_KEYS": f"@{keys}"}) as supervisor:
        url = supervisor.says(r"ready: a simulated RunPod endpoint, (\S+)\n", 20)[1]

        def ask(key: str) -> int:
            with suppress(httpx.TransportError):
                return httpx.get(f"{url}/health", headers={"Authorization": f"Bearer {key}"}).status_code
            return 0

        assert (ask("the-old-key"), ask("the-new-key")) == (200, 401)
        keys.write_text("the-new-key\n")
        supervisor.signal(signal.SIGHUP)
        supervisor.says("keys read again")
        wait_until(lambda: ask("the-new-key") == 200, "the new key")
        assert ask("the-old-key") == 401
        children = psutil.Process(supervisor.process.pid).children()
        (simulator,) = (child for child in children if "supervisor.local_runpod.simulator" in child.cmdline())
        simulator.kill()
        supervisor.says("the simulated RunPod ended")
        wait_until(lambda: ask("the-new-key") == 200, "the next one")
        assert ask("the-old-key") == 401


@pytest.mark.slow
def test_outside_of_runpod_a_simulated_one_is_started() -> None:
    with Supervisor("m", "--mode", "queue") as supervisor:
        line = supervisor.says(r"ready: a simulated RunPod endpoint, http://\S+\n  (curl .+)\n", 20)[1]
        pasted = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
        answer = json.loads(pasted.stdout)
        assert answer["status"] == "COMPLETED"
        port = supervisor.says(r"starting m on http://127.0.0.1:(\d+)")[1]
        with Supervisor("m", "--mode", "queue", "--port", port) as second:
            assert second.exit_code() == 2
            assert f"can't listen on 127.0.0.1, port {port}" in second.output
        assert answer["output"][0]["object"] == "chat.completion"
        family = psutil.Process(supervisor.process.pid).children(recursive=True)
        supervisor.signal(signal.SIGINT)
        assert supervisor.exit_code() == 0
        assert have_ended(*family)
