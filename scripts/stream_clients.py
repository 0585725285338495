"""Client processes that read many streams of /v1/completions at once, cheaply; for scripts/bench_vllm.py.

`Clients(4, patience=120).run_wave(target, streams=256, tokens=128)` starts all streams together, on connections that
are open already and stay so for that target's next wave, and tells what came of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import uvloop

KEY = "a-key-for-the-benchmark"
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
# They look like this on the wire only: in generated text quotes are escaped, and no line begins.
EVENT, DONE, ERROR, LAST_CHUNK = b'\ndata: {"id"', b"data: [DONE]", b'data: {"error"', b"\r\n0\r\n\r\n"
TAIL_LENGTH = len(EVENT) - 1  # kept of each read, for an event cut in two; if it were more, one would count twice
WORDS = "of many: tell me in your own words what the sea looks like on a quiet morning"

Reading = dict[str, Any]
Target = str | int  # a unix socket's path, or a port


class Stream(asyncio.Protocol):
    """A keep-alive connection that parses only what it must: it has to be cheaper than the server that it measures."""

    transport: Any = None
    ended: asyncio.Future[None] | None = None
    problem, events, first_event_at, ended_at = "no connection", 0, 0.0, 0.0

    def __init__(self, target: Target) -> None:
        self.target = target

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes, ended: asyncio.Future[None]) -> None:
        self.tail, self.has_done, self.events, self.ended = b"", False, 0, ended
        self.sent_at = time.monotonic()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self.tail and not data.startswith(b"HTTP/1.1 200 "):
            self.end(data[:60].decode(errors="replace").partition("\r\n")[0])
            return
        data = self.tail + data
        if count := data.count(EVENT):
            if not self.events:
                self.first_event_at = time.monotonic()
            self.events += count
        self.has_done = self.has_done or DONE in data
        self.tail = data[-TAIL_LENGTH:]
        if ERROR in data:
            self.end("an error event")
        elif data.endswith(LAST_CHUNK):
            self.end("" if self.has_done and self.events else "no [DONE]")

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.end("cut")

    def end(self, problem: str) -> None:
        if self.ended is not None:
            self.ended_at, self.problem, ended, self.ended = time.monotonic(), problem, self.ended, None
            if not ended.done():
                ended.set_result(None)
            if problem and self.transport:
                self.transport.abort()


def run_client(pipe: Connection) -> None:
    """Runs a client process: one wave for each order."""
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, whose end closes the pipe
    loop, streams = uvloop.new_event_loop(), list[Stream]()
    with contextlib.suppress(EOFError):
        while True:
            target, count, *request = pipe.recv()
            loop.run_until_complete(connect(streams, target, count))
            pipe.send("connected")
            pipe.recv()  # it says that all others are connected, too
            pipe.send(loop.run_until_complete(run_wave(streams, *request)))


async def connect(streams: list[Stream], target: Target, count: int) -> None:
    await asyncio.sleep(0.001)  # lets the loop see which were closed meanwhile
    kept = [stream for stream in streams if stream.transport and stream.target == target][:count]
    for stream in streams:
        if stream.transport and stream not in kept:
            stream.transport.abort()
    streams[:] = kept + [Stream(target) for _ in range(count - len(kept))]
    for stream in streams[len(kept) :]:
        loop, make_protocol = asyncio.get_running_loop(), lambda stream=stream: stream
        with contextlib.suppress(OSError):  # its problem stays "no connection"
            if isinstance(target, str):
                await loop.create_unix_connection(make_protocol, target)
            else:
                await loop.create_connection(make_protocol, "127.0.0.1", target)


async def run_wave(streams: list[Stream], name: str, tokens: int, patience: float) -> Reading:
    connected, requests = [stream for stream in streams if stream.transport], []
    for number in range(len(connected)):
        # The prompts are new, or vLLM would have them in its cache. "model" is left out: there is only one.
        body = {"prompt": f"{name}-{number} {WORDS}", "stream": True, "temperature": 0, "ignore_eos": True}
        text = json.dumps(body | {"max_tokens": tokens, "min_tokens": tokens})
        requests.append(f"{HEAD}Content-Length: {len(text)}\r\n\r\n{text}".encode())
    ends = [asyncio.get_running_loop().create_future() for _ in connected]
    cpu, started_at = time.process_time(), time.monotonic()
    for stream, request, ended in zip(connected, requests, ends, strict=True):
        stream.ask(request, ended)
    if ends:
        await asyncio.wait(ends, timeout=patience)
    cpu = time.process_time() - cpu
    for stream in connected:
        stream.end("timeout")
    return {
        "time": (started_at, max((stream.ended_at for stream in connected), default=started_at)),
        "events": sum(stream.events for stream in connected),
        "first": [stream.first_event_at - stream.sent_at for stream in connected if not stream.problem],
        "problems": [stream.problem for stream in streams if stream.problem],
        "cpu": cpu,
    }


class Clients:
    """A group of client processes. A stream that hasn't ended after `patience` seconds has failed."""

    def __init__(self, count: int, patience: float) -> None:
        self.patience, self.wave_count, self.pipes = patience, 0, list[Connection]()
        context = multiprocessing.get_context("spawn")  # not fork: no client may hold another's end of a pipe
        for _ in range(count):
            our_end, client_end = context.Pipe()
            context.Process(target=run_client, args=(client_end,), daemon=True).start()
            client_end.close()
            self.pipes.append(our_end)

    def run_wave(self, target: Target, streams: int, tokens: int) -> Reading:
        """Runs `streams` streams at once, until the last has ended."""
        self.wave_count += 1
        for number, pipe in enumerate(self.pipes):
            share = len(range(number, streams, len(self.pipes)))
            pipe.send((target, share, f"{os.getpid()}-{self.wave_count}-{number}", tokens, self.patience))
        for pipe in self.pipes:
            pipe.recv()
        for pipe in self.pipes:
            pipe.send("go")
        rows = [row for pipe in self.pipes if (row := pipe.recv())["first"] or row["problems"]]
        began, ended = zip(*(row["time"] for row in rows), strict=True)
        joined = {key: [item for row in rows for item in row[key]] for key in ("first", "problems")}
        events, cpu = sum(row["events"] for row in rows), max(row["cpu"] for row in rows)
        return {**joined, "seconds": max(ended) - min(began), "events": events, "cpu": cpu}
