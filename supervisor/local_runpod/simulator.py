"""RunPod's side of the queue on a laptop, over HTTP: what workers poll and post to, and what clients ask.

    python -m supervisor.local_runpod.simulator --port 8000

`docs/simulator.md` lists the routes. What jobs go through is in `queue.py`; here is HTTP. `scripts/fake_runpod` is this
one with faults on request, limits of rates, and a log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from functools import partial
from hmac import compare_digest
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from supervisor.local_runpod.child import CLIENTS_KEYS, WORKERS_KEY
from supervisor.local_runpod.queue import JOB_BYTES, Job, Queue, State, parse

# How long /stream waits for a chunk.
STREAM_WAIT = 1.0
# For /runsync?wait=, in milliseconds.
WAIT, WAIT_LEAST, WAIT_MOST = 90_000, 1000, 300_000
# Connections of workers rest between polls and posts; uvicorn's five seconds would reset them under a post.
KEEP_ALIVE = 120

PLATFORM = ("job-take", "job-take-batch", "job-stop", "job-stream", "job-done", "ping")
Endpoint = Callable[[Request], Awaitable[Response]]


def reply(content: object, status: int = 200) -> Response:
    # ASCII: half of a surrogate pair, which JSON can carry, has no UTF-8.
    return Response(json.dumps(content).encode(), status, media_type="application/json")


class WireProtocol(HttpToolsProtocol):
    """Requests carry their transport, for polls need to know whether it is closed."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["transport"] = self.transport


def is_gone(request: Request) -> bool:
    """Whether the other side is known to have left; not `is_disconnected`, for nothing may happen while one asks."""
    return bool(request.state.transport.is_closing())


async def has_left(receive: Receive) -> None:
    """Returns when the other side leaves. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, waiting_for: Coroutine[Any, Any, None]) -> bool:
    """Waits for it to end, and is True; False if the other side left before."""
    leaving = asyncio.ensure_future(has_left(request.receive))
    waiting = asyncio.ensure_future(waiting_for)
    try:
        await asyncio.wait((leaving, waiting), return_when=asyncio.FIRST_COMPLETED)
        return waiting.done()
    finally:
        leaving.cancel()
        waiting.cancel()


class Handed(Response):
    """Something that must not get lost: `undo` is called if the connection is closed when it is written."""

    def __init__(self, content: object, undo: Callable[[], object]) -> None:
        super().__init__(json.dumps(content).encode(), media_type="application/json")
        self.undo = undo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start" and scope["state"]["transport"].is_closing():
                self.undo()

        await super().__call__(scope, receive, watched)


class Guarded:
    """Asks workers for the worker's key, and everybody else for one of the clients', where there are any."""

    def __init__(self, app: Starlette, clients: Sequence[str], worker: str) -> None:
        self.app = app
        self.clients = clients
        self.worker = [worker] if worker else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            known = self.worker if scope["path"].split("/")[3:4] in [[name] for name in PLATFORM] else self.clients
            given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ").encode()
            if known and sum(compare_digest(given, key.encode()) for key in known) == 0:
                await reply({"error": "a valid key is needed: 'Authorization: Bearer KEY'"}, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Simulator:
    """The app of one endpoint. `routes` and `route` are what scripts/fake_runpod does more in."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def app(self, endpoint: str) -> Starlette:
        return Starlette(
            routes=self.routes(endpoint),
            exception_handlers={HTTPException: as_json, ClientDisconnect: _as_nothing},
        )

    def routes(self, endpoint: str) -> list[BaseRoute]:
        routes = [
            self.route("job-take", "/{worker}", partial(self.take, False), "GET"),
            self.route("job-take-batch", "/{worker}", partial(self.take, True), "GET"),
            self.route("job-stop", "/{worker}", self.stop, "GET"),
            self.route("job-stream", "/{worker}/{job}", partial(self.post, self.queue.chunk), "POST"),
            self.route("job-done", "/{worker}/{job}", partial(self.post, self.queue.result), "POST"),
            self.route("ping", "/{worker}", self.ping, "GET"),
            self.route("run", "", self.run, "POST"),
            self.route("runsync", "", self.runsync, "POST"),
            self.route("status", "/{job}", self.status, "GET", "POST"),
            self.route("stream", "/{job}", self.stream, "GET", "POST"),
            self.route("cancel", "/{job}", self.cancel, "POST"),
            self.route("retry", "/{job}", self.retry, "POST"),
            self.route("purge-queue", "", self.purge, "POST"),
            self.route("health", "", self.health, "GET"),
            self.route("openai", "/{path:path}", self.openai, "GET", "POST", "PUT", "PATCH", "DELETE"),
        ]
        return [Mount(f"/v2/{endpoint}", routes=routes)]

    def route(self, what: str, path: str, handler: Endpoint, *methods: str) -> Route:
        return Route(f"/{what}{path}", handler, methods=methods)

    def _job(self, request: Request) -> Job:
        job = self.queue.jobs.get(request.path_params["job"])
        if job is None:
            raise HTTPException(404, "job not found")
        return job

    # The platform's side

    def _worker(self, request: Request) -> str:
        """The one that asks: it was heard of."""
        name = str(request.path_params["worker"])
        self.queue.worker(name).seen = time.monotonic()
        return name

    async def take(self, batch: bool, request: Request) -> Response:
        size = number_in(request, "batch_size", 1, 1, 10_000) if batch else 1
        jobs = await self.queue.take(self._worker(request), size, partial(is_gone, request))
        if not jobs:
            return Response(status_code=204)
        deliveries = [job.delivery() for job in jobs]
        return Handed(deliveries if batch else deliveries[0], partial(self.queue.put_back, jobs))

    async def stop(self, request: Request) -> Response:
        worker = self._worker(request)
        ids = await self.queue.stops(worker, partial(is_gone, request))
        if not ids:
            return Response(status_code=204)
        return Handed({"jobsToStop": ids}, partial(self.queue.worker(worker).stops.extend, ids))

    async def post(self, store: Callable[..., int], request: Request) -> Response:
        body, key = await request.body(), request.headers.get("idempotency-key")
        status = store(self._worker(request), self._job(request), body, key)
        return reply({} if status == 200 else {"error": "too large, or not the JSON object that is expected"}, status)

    async def ping(self, request: Request) -> Response:
        self.queue.ping(self._worker(request), dict(request.query_params))
        return reply({})

    # The client's side

    async def _submit(self, request: Request, *, sync: bool) -> Job:
        try:
            return self.queue.submit(await read_json(request, JOB_BYTES[sync]), sync=sync)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    async def run(self, request: Request) -> Response:
        return reply((await self._submit(request, sync=False)).view())

    async def runsync(self, request: Request) -> Response:
        wait = number_in(request, "wait", WAIT, WAIT_LEAST, WAIT_MOST) / 1000
        job = await self._submit(request, sync=True)
        await job.changed.until(lambda: job.over, wait)
        if job.gone:
            raise HTTPException(404, "job not found")
        return reply(job.view())

    async def status(self, request: Request) -> Response:
        return reply(self._job(request).view())

    async def stream(self, request: Request) -> Response:
        job = self._job(request)
        await job.changed.until(lambda: job.over or len(job.chunks) > job.read, STREAM_WAIT)
        self._job(request)  # which may have expired
        chunks = [{"output": chunk} for chunk in job.chunks[job.read :]]
        job.read = len(job.chunks)
        error = {"error": job.result["error"]} if "error" in job.result else {}
        return reply({"status": job.state, "stream": chunks, **error})

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        self.queue.cancel(job)
        return reply({"id": job.id, "status": job.state})

    async def retry(self, request: Request) -> Response:
        job = self._job(request)
        try:
            self.queue.retry(job)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return reply({"id": job.id, "status": job.state})

    async def purge(self, request: Request) -> Response:
        return reply({"removed": self.queue.purge(), "status": "completed"})

    async def health(self, request: Request) -> Response:
        return reply(self.queue.health())

    async def openai(self, request: Request) -> Response:
        wrapped: dict[str, Any] = {"openai_route": f"/{request.path_params['path']}"}
        if await request.body():
            wrapped["openai_input"] = await read_json(request, JOB_BYTES[False])
        job = self.queue.submit({"input": wrapped}, sync=False)
        body = wrapped.get("openai_input")
        streams = isinstance(body, dict) and bool(body.get("stream"))
        started = job.changed.until(lambda: job.over or (streams and job.chunks))
        if not await unless_left(request, started):
            if streams:
                self.queue.cancel(job)
            return Response(status_code=499)  # nobody reads it
        if streams and job.chunks:
            abandoned = BackgroundTask(self._abandon, job)
            return StreamingResponse(_text_of(job), media_type="text/event-stream", background=abandoned)
        return _whole(job, "text/event-stream" if streams else "text/plain")

    async def _abandon(self, job: Job) -> None:
        """After a stream: the job is over, or its client has left."""
        self.queue.cancel(job)


async def read_json(request: Request, limit: int) -> Any:
    body = await request.body()
    if len(body) > limit:
        raise HTTPException(413, f"the body is larger than {limit} bytes")
    try:
        return parse(body)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None


def number_in(request: Request, name: str, default: int, least: int, most: int) -> int:
    try:
        value = int(request.query_params.get(name, default))
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise HTTPException(400, f"{name} must be a whole number from {least} to {most}")
    return value


async def as_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return reply({"error": error.detail}, error.status_code)


async def _as_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _text(output: Any) -> str:
    return output if isinstance(output, str) else json.dumps(output)


async def _text_of(job: Job) -> AsyncIterator[bytes]:
    """What the chunks say, as they come, until the job is over."""
    read = 0
    while True:
        waiting = job.chunks[read:]
        if waiting:
            read += len(waiting)
            yield "".join(_text(chunk) for chunk in waiting).encode(errors="replace")
        elif job.over:
            return
        else:
            await job.changed.until(lambda: job.over or len(job.chunks) > read)  # noqa: B023 - awaited here


def _whole(job: Job, text_type: str) -> Response:
    """The answer of a job that is over and has streamed nothing; text that is JSON says so in its content type."""
    if job.gone or job.state in (State.CANCELLED, State.TIMED_OUT):
        return reply({"error": f"job {'expired' if job.gone else job.state}"}, 500)
    content = job.result.get("error" if job.state is State.FAILED else "output")
    status = 500 if job.state is State.FAILED else 200
    if isinstance(content, list) and content and all(isinstance(part, str) for part in content):
        content = "".join(content)
    elif isinstance(content, list) and len(content) == 1:
        content = content[0]
    if not isinstance(content, str):
        return reply(content, status)
    text = content.encode(errors="replace")
    try:
        parse(text)
    except ValueError:
        return Response(text, status, media_type=text_type)
    return Response(text, status, media_type="application/json")


class Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # they end the process at once


def _leave(*_: object) -> None:
    """Nothing in here outlives the process, so there is nothing to wait for, open polls included."""
    os._exit(0)


def _leave_with_parent() -> None:
    while os.read(0, 65536):
        pass
    _leave()


def _listen(host: str, port: int) -> socket.socket:
    # With its protocol, which `socket.create_server` leaves out: asyncio turns Nagle off only where it sees TCP, and
    # answers written in two parts would take 40 ms.
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(2048)
    return listener


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="RunPod's queue on a laptop.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--fd", type=int, help="a socket that is bound already, instead of host and port")
    parser.add_argument("--endpoint", default="local", help="the endpoint's id (default: local)")
    parser.add_argument("--hold", type=float, default=20.0, help="seconds for which an empty poll stays open (20)")
    parser.add_argument("--lost-after", type=float, default=40.0, help="seconds without a ping that names the job (40)")
    parser.add_argument("--with-parent", action="store_true", help="leave when standard input ends")
    return parser.parse_args()


def main(made: type[Simulator] = Simulator) -> None:
    options = _arguments()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if options.with_parent:
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its own mistakes only
    try:
        listener = _listen(options.host, options.port) if options.fd is None else socket.socket(fileno=options.fd)
    except OSError as error:
        sys.exit(f"simulator: cannot listen on {options.host}:{options.port}: {error.strerror}")
    # A job is read as RunPod hands it on: how deep and how long its values may be is the worker's to bear.
    sys.setrecursionlimit(20_000)
    sys.set_int_max_str_digits(0)
    app = made(Queue(options.hold, options.lost_after)).app(options.endpoint)
    clients = [key for key in os.environ.get(CLIENTS_KEYS, "").split(",") if key]
    config = uvicorn.Config(
        Guarded(app, clients, os.environ.get(WORKERS_KEY, "")),
        http=WireProtocol,
        ws="none",
        loop="asyncio",  # it writes at once, so that a closed connection shows in the write
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE,
    )
    host, port = listener.getsockname()[:2]
    print(f"simulator: http://{host}:{port}/v2/{options.endpoint}", flush=True)
    Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
