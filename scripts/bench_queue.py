#!/usr/bin/env python3
"""Prints what RunPod's queue costs: through our worker, beside a plain SDK handler, beside vLLM's own socket.

    .venv/bin/python scripts/bench_queue.py [--jobs 64] [--tokens 250] [--rate 50] [--latency 20] [--runs 3]

The fake vLLM streams --jobs answers at once, --rate tokens per second each, and:

    supervisor  is `supervisor up` in queue mode, over scripts/fake_runpod
    plain SDK   is a handler that yields every event as it reads it from the same vLLM's socket, on a RunPod of its own
    direct      reads the same streams from that socket, with nothing in between

Each POST of a chunk takes --latency milliseconds longer than it takes by itself. Short jobs are not streamed, one
token each. A first chunk is timed from the job's creation, or from the request; a row is the median of the runs. The
exit code is 0 only where the supervisor takes at most 5 % longer than direct, with at most half a POST per token.
Bounded in count and time; loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from supervisor.local_runpod.child import runpod_variables as simulated

ROOT = Path(__file__).resolve().parent.parent
SUPERVISOR = ROOT / ".venv" / "bin" / "supervisor"
PATIENCE = 300.0
# The fake, like RunPod, takes at most this many jobs in ten seconds.
JOBS_IN_TEN_SECONDS = 1000
MAX_JOBS, SHORT_JOBS = 400, 200
# The supervisor must stay below these marks.
MAX_TIME_RATIO, MAX_POSTS_PER_TOKEN = 1.05, 0.5
QUIET_SDK = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true", "RUNPOD_LOG_LEVEL": "ERROR"}
PATH = "/v1/chat/completions"


def make_request(tokens: int, *, stream: bool) -> dict[str, Any]:
    question = {"role": "user", "content": "Hello"}
    return {"model": "m", "messages": [question], "stream": stream, "max_tokens": tokens}


@dataclass
class Reading:
    """The figures of one run: in seconds, but for the counts."""

    total: float
    first_chunks: list[float] = field(default_factory=list)  # from a job's creation, or the request
    post_count: int = 0
    short_total: float = 0.0  # of SHORT_JOBS jobs


class RunPod:
    """A process of scripts/fake_runpod and its endpoint."""

    def __init__(self, latency: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "fake_runpod", "--port", "0", "--with-parent"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]
        self.base = self.url.partition("/v2/")[0]
        self.latency = latency
        self.submitted_at: list[float] = []  # the moment of each job

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    async def wait_for_worker(self, session: aiohttp.ClientSession) -> None:
        """Waits until a worker takes jobs."""
        self.session = session
        fault = {"on": "job-stream", "do": "delay", "seconds": self.latency, "times": None}
        await self._ask("POST", f"{self.base}/faults", fault)

        async def takes_jobs() -> bool:
            return any(name.startswith("job-take") for name in await self._count_requests())

        await wait_until(takes_jobs, "a worker to take jobs", 60)

    async def _ask(self, method: str, url: str, content: object = None) -> Any:
        async with self.session.request(method, url, json=content) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def _count_requests(self) -> dict[str, int]:
        workers = await self._ask("GET", f"{self.base}/workers")
        return dict(next(iter(workers.values()))["counts"]) if workers else {}

    async def _run_jobs(self, number: int, tokens: int, *, stream: bool) -> list[dict[str, Any]]:
        """Submits `number` jobs at once. Returns what the fake knows of them when all have ended well."""
        content = {"input": {"openai_route": PATH, "openai_input": make_request(tokens, stream=stream)}}

        async def has_room() -> bool:
            recent = sum(at > time.monotonic() - 10.5 for at in self.submitted_at)
            return recent + number <= JOBS_IN_TEN_SECONDS

        await wait_until(has_room, "RunPod's limit of requests", 20)
        self.submitted_at += [time.monotonic()] * number
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask("POST", f"{self.url}/run", content)) for _ in range(number)]

        async def is_over() -> bool:
            jobs = (await self._ask("GET", f"{self.url}/health"))["jobs"]
            return not jobs["inQueue"] and not jobs["inProgress"]

        await wait_until(is_over, f"the end of {number} jobs", PATIENCE)
        found = [await self._ask("GET", f"{self.base}/jobs/{task.result()['id']}") for task in tasks]
        for job in found:
            if job["state"] != "COMPLETED":
                raise SystemExit(f"bench_queue: a job is {job['state']}: {job.get('error')}")
        return found

    async def measure(self, jobs: int, tokens: int) -> Reading:
        before = await self._count_requests()
        finished_jobs = await self._run_jobs(jobs, tokens, stream=True)
        after = await self._count_requests()
        for job in finished_jobs:
            text = "".join(chunk["output"] for chunk in job["chunks"])
            if (events := count_tokens(text.encode())) != tokens:
                raise SystemExit(f"bench_queue: {events} tokens instead of {tokens}")
        posts = sum(after.get(name, 0) - before.get(name, 0) for name in ("job-stream", "job-done"))
        times = [job["timeline"] for job in finished_jobs]
        short = [job["timeline"] for job in await self._run_jobs(SHORT_JOBS, 1, stream=False)]
        return Reading(span(times), [each["first_chunk"] - each["created"] for each in times], posts, span(short))


async def wait_until(condition: Callable[[], Awaitable[bool]], description: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"bench_queue: waited {seconds:g} s for {description}")
        await asyncio.sleep(0.1)


def span(times: list[dict[str, float]]) -> float:
    return max(each["done"] for each in times) - min(each["created"] for each in times)


def count_tokens(stream: bytes) -> int:
    """Returns the number of tokens: of the events with a piece of the answer."""
    if not stream.endswith(b"data: [DONE]\n\n"):
        raise SystemExit(f"bench_queue: a stream ends with {stream[-200:]!r}")
    return len(re.findall(rb'"content": ?"[^"]', stream))


async def measure_direct(socket: str, jobs: int, tokens: int) -> Reading:
    started_at = time.monotonic()
    reading = Reading(0.0)

    async def read_stream(session: aiohttp.ClientSession) -> None:
        answer = bytearray()
        async with session.post(f"http://vllm{PATH}", json=make_request(tokens, stream=True)) as response:
            async for data in response.content.iter_any():
                if not answer:
                    reading.first_chunks.append(time.monotonic() - started_at)
                answer += data
        if (events := count_tokens(bytes(answer))) != tokens:
            raise SystemExit(f"bench_queue: {events} tokens instead of {tokens}")

    async with open_session(socket) as session, asyncio.TaskGroup() as group:
        for _ in range(jobs):
            group.create_task(read_stream(session))
    reading.total = time.monotonic() - started_at
    return reading


def open_session(socket: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(socket, limit=0), timeout=aiohttp.ClientTimeout(total=None)
    )


# The plain worker: this file, started again


def run_plain_worker() -> None:
    socket, jobs = os.environ["BENCH_SOCKET"], int(os.environ["BENCH_JOBS"])

    async def handler(job: dict[str, Any]) -> AsyncIterator[object]:
        given = job["input"]
        url = f"http://vllm{given['openai_route']}"
        async with open_session(socket) as session, session.post(url, json=given["openai_input"]) as response:
            if response.content_type != "text/event-stream":
                yield await response.json()
                return
            event = b""
            async for line in response.content:
                event += line
                if line == b"\n":
                    yield event.decode()
                    event = b""

    import runpod  # noqa: PLC0415

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # at the end, a last ping may reach nobody
    runpod.serverless.start(
        {"handler": handler, "concurrency_modifier": lambda _: jobs, "return_aggregate_stream": True}
    )


# Processes


@contextlib.contextmanager
def start_processes(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, RunPod, RunPod]]:
    """Starts all processes. Yields vLLM's socket, and the endpoints of the two workers."""
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    concurrency = str(max(64, arguments.jobs))
    knobs = {
        "SUPERVISOR_VLLM": str(ROOT / "scripts" / "fake_vllm"),
        "SUPERVISOR_MAX_CONCURRENCY": concurrency,
        "FAKE_VLLM_PLAN": json.dumps({"token_interval": 1 / arguments.rate}),
        "PORT": "0",
        "TMPDIR": str(folder),
    }
    endpoints = [RunPod(arguments.latency / 1000) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        log = folder / "log"
        with log.open("wb") as file:
            supervisor = subprocess.Popen(
                [str(SUPERVISOR), "up", "m"],
                env=environ | knobs | simulated(endpoints[0].url), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        stack.enter_context(end_process(supervisor))
        socket = find_socket(supervisor, log)
        sdk_vars = {"BENCH_SOCKET": socket, "BENCH_JOBS": concurrency, **QUIET_SDK}
        plain = subprocess.Popen(
            [sys.executable, __file__, "--as-plain-worker"],
            env=environ | sdk_vars | simulated(endpoints[1].url), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        stack.enter_context(end_process(plain))
        for endpoint in endpoints:
            stack.callback(endpoint.stop)  # or the plain worker would wait for its polls
        stack.callback(plain.terminate)
        yield socket, endpoints[0], endpoints[1]


@contextlib.contextmanager
def end_process(process: subprocess.Popen[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def find_socket(process: subprocess.Popen[Any], log: Path) -> str:
    """Finds vLLM's socket, once it is ready."""
    deadline = time.monotonic() + 60
    while "-> ready" not in (text := log.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"bench_queue: the supervisor does not get ready:\n{text}")
        time.sleep(0.05)
    port = re.search(r"supervisor: starting .* on http://\S+?:(\d+)\n", text)
    assert port is not None, text
    with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/status") as answer:
        command = shlex.split(json.load(answer)["command"])
    return command[command.index("--uds") + 1]


async def bench(arguments: argparse.Namespace, socket: str, ours: RunPod, plain: RunPod) -> dict[str, list[Reading]]:
    size = (arguments.jobs, arguments.tokens)
    rows: dict[str, list[Reading]] = {"supervisor": [], "plain SDK": [], "direct": []}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await ours.wait_for_worker(session)
        await plain.wait_for_worker(session)
        for _ in range(arguments.runs):
            rows["direct"].append(await measure_direct(socket, *size))
            rows["supervisor"].append(await ours.measure(*size))
            rows["plain SDK"].append(await plain.measure(*size))
    return rows


def report(rows: dict[str, list[Reading]], arguments: argparse.Namespace) -> bool:
    tokens = arguments.jobs * arguments.tokens
    print(
        f"{arguments.jobs} streams of {arguments.tokens} tokens at {arguments.rate:g}/s, {arguments.latency:g} ms for "
        f"each POST of a chunk; {SHORT_JOBS} short jobs; median of {arguments.runs}"
    )
    print(f"{'':12} {'total':>9} {'first chunk: median':>21} {'slowest':>9} {'POSTs/token':>12} {'short jobs/s':>13}")
    for name, runs in rows.items():
        total = statistics.median(run.total for run in runs)
        first = statistics.median(statistics.median(run.first_chunks) for run in runs)
        slowest = statistics.median(max(run.first_chunks) for run in runs)
        line = f"{name:12} {total:8.2f}s {first * 1000:19.0f}ms {slowest * 1000:7.0f}ms"
        if name != "direct":
            posts = statistics.median(run.post_count for run in runs) / tokens
            line += f" {posts:12.2f} {SHORT_JOBS / statistics.median(run.short_total for run in runs):13.1f}"
        print(line)
    time_ratio = statistics.median(
        ours.total / theirs.total for ours, theirs in zip(rows["supervisor"], rows["direct"], strict=True)
    )
    posts = statistics.median(run.post_count for run in rows["supervisor"]) / tokens
    marks_met = [time_ratio <= MAX_TIME_RATIO, posts <= MAX_POSTS_PER_TOKEN]
    print(f"supervisor / direct: {time_ratio:.3f}, at most {MAX_TIME_RATIO}: {'ok' if marks_met[0] else 'NOT'}")
    print(f"POSTs per token:     {posts:.3f}, at most {MAX_POSTS_PER_TOKEN}: {'ok' if marks_met[1] else 'NOT'}")
    return all(marks_met)


def main() -> None:
    if sys.argv[1:] == ["--as-plain-worker"]:
        del sys.argv[1:]  # the SDK would read them
        run_plain_worker()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=64, help=f"streams at once, up to {MAX_JOBS}")
    parser.add_argument("--tokens", type=int, default=250, help="of each stream")
    parser.add_argument("--rate", type=float, default=50, help="tokens per second of each stream")
    parser.add_argument("--latency", type=float, default=20, help="milliseconds of each POST of a chunk")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if not 1 <= arguments.jobs <= MAX_JOBS or min(arguments.tokens, arguments.runs) < 1 or arguments.rate <= 0:
        parser.error(f"1 to {MAX_JOBS} jobs, at least one token and run, a rate above zero")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench_queue: told to end"))  # so that every child is ended, too
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, start_processes(arguments, Path(folder)) as processes:
        rows = asyncio.run(bench(arguments, *processes))
    if not report(rows, arguments):
        sys.exit("bench_queue: a mark is missed")


if __name__ == "__main__":
    main()
