"""RunPod's side of the queue on a laptop, over HTTP: what workers poll and post to, and what clients ask.

    python -m supervisor.local_runpod.simulator --port 8000

`docs/development/simulator.md` has the routes, `queue.py` what jobs go through; `scripts/fake_runpod` adds faults.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from supervisor.local_runpod.child import CLIENT_KEYS, WORKER_KEY
from supervisor.local_runpod.queue import JOB_LIMITS, BadRequest, Job, Queue, Status, Worker, parse_json

# /stream waits so many seconds for a chunk, and so often it is looked whether a client of /openai has left.
STREAM_WAIT, DISCONNECT_CHECK = 1.0, 0.5
# Connections of workers rest between polls and posts; uvicorn's five seconds would reset them under a post.
KEEP_ALIVE = 120
# These routes are the workers'; all others are the clients'.
WORKER_ROUTES = ("job-take", "job-take-batch", "job-stop", "job-stream", "job-done", "ping")

Handler = Callable[[Request], Awaitable[Response]]


def reply(content: object, status: int = 200) -> Response:
    # It is ASCII: half of a surrogate pair, which JSON can carry, has no UTF-8.
    return Response(json.dumps(content).encode(), status, media_type="application/json")


class WireProtocol(HttpToolsProtocol):
    """Gives requests their transport, for who hands something out must know whether it is closed."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["transport"] = self.transport


class Handout(Response):
    """A handout must not get lost: `undo` is called if the connection is closed when it is written."""

    def __init__(self, content: object, undo: Callable[[], object]) -> None:
        super().__init__(json.dumps(content).encode(), media_type="application/json")
        self.undo = undo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_check(message: Message) -> None:
            await send(message)
            # Nothing else has happened since it was taken: what a poller that has left would get is there for the next.
            if message["type"] == "http.response.start" and scope["state"]["transport"].is_closing():
                self.undo()

        await super().__call__(scope, receive, send_and_check)


class KeyGuard:
    """Asks workers for the worker's key, and everybody else for one of the clients', where there are any."""

    def __init__(self, app: ASGIApp, client_keys: Sequence[str], worker_keys: Sequence[str]) -> None:
        self.app, self.client_keys, self.worker_keys = app, client_keys, worker_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            keys = self.worker_keys if "".join(scope["path"].split("/")[3:4]) in WORKER_ROUTES else self.client_keys
            given_key = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ").encode()
            if keys and not any(compare_digest(given_key, key.encode()) for key in keys):
                await reply({"error": "a valid key is needed: 'Authorization: Bearer KEY'"}, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Simulator:
    """Makes the app of one endpoint. scripts/fake_runpod does more in `routes` and `route`."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def app(self, endpoint: str) -> Starlette:
        handlers = dict.fromkeys((HTTPException, BadRequest, ClientDisconnect), reply_error)
        return Starlette(routes=self.routes(endpoint), exception_handlers=handlers)

    def routes(self, endpoint: str) -> list[BaseRoute]:
        routes = [
            self.route("job-take", "/{worker}", partial(self.take, batch=False), "GET"),
            self.route("job-take-batch", "/{worker}", partial(self.take, batch=True), "GET"),
            self.route("job-stop", "/{worker}", self.stop, "GET"),
            self.route("job-stream", "/{worker}/{job}", partial(self.post, self.queue.store_chunk), "POST"),
            self.route("job-done", "/{worker}/{job}", partial(self.post, self.queue.store_result), "POST"),
            self.route("ping", "/{worker}", self.ping, "GET"),
            self.route("run", "", self.run, "POST"),
            self.route("runsync", "", self.runsync, "POST"),
            self.route("status", "/{job}", self.status, "GET", "POST"),
            self.route("stream", "/{job}", self.stream, "GET", "POST"),
            self.route("cancel", "/{job}", partial(self.change, self.queue.cancel), "POST"),
            self.route("retry", "/{job}", partial(self.change, self.queue.retry), "POST"),
            self.route("purge-queue", "", self.purge, "POST"),
            self.route("health", "", self.health, "GET"),
            self.route("openai", "/{path:path}", self.openai, "GET", "POST", "PUT", "PATCH", "DELETE"),
        ]
        return [Mount(f"/v2/{endpoint}", routes=routes)]

    def route(self, name: str, path: str, handler: Handler, *methods: str) -> Route:
        return Route(f"/{name}{path}", handler, methods=methods)

    def find_job(self, request: Request) -> Job:
        job = self.queue.jobs.get(request.path_params["job"])
        if job is None:
            raise HTTPException(404, "job not found")
        return job

    # The platform's side

    def find_worker(self, request: Request) -> Worker:
        return self.queue.note_worker(request.path_params["worker"])

    async def take(self, request: Request, *, batch: bool) -> Response:
        size = read_number(request, "batch_size", 1, 1, 10_000) if batch else 1
        jobs = await self.queue.take(self.find_worker(request), size)
        if not jobs:
            return Response(status_code=204)
        deliveries = [job.worker_view() for job in jobs]
        return Handout(deliveries if batch else deliveries[0], partial(self.queue.put_back, jobs))

    async def stop(self, request: Request) -> Response:
        worker = self.find_worker(request)
        ids = await self.queue.take_stops(worker)
        return Handout({"jobsToStop": ids}, partial(self.queue.stop, worker, ids)) if ids else Response(status_code=204)

    async def post(self, store: Callable[[Worker, Job, bytes, str], None], request: Request) -> Response:
        body = await request.body()
        key = request.headers.get("idempotency-key") or uuid.uuid4().hex  # a post without one is like no other
        store(self.find_worker(request), self.find_job(request), body, key)
        return reply({})

    async def ping(self, request: Request) -> Response:
        self.queue.receive_ping(self.find_worker(request), request.query_params)
        return reply({})

    # The client's side

    async def run(self, request: Request) -> Response:
        return reply(self.queue.submit(await read_json(request), sync=False).client_view())

    async def runsync(self, request: Request) -> Response:
        wait = read_number(request, "wait", 90_000, 1000, 300_000) / 1000
        job = self.queue.submit(await read_json(request, JOB_LIMITS[True]), sync=True)
        await job.change.wait_until(lambda: job.is_over, wait)
        if job.status is Status.EXPIRED:
            raise HTTPException(404, "job not found")
        return reply(job.client_view())

    async def status(self, request: Request) -> Response:
        return reply(self.find_job(request).client_view())

    async def stream(self, request: Request) -> Response:
        job = self.find_job(request)
        await job.change.wait_until(lambda: job.is_over or len(job.chunks) > job.chunks_read, STREAM_WAIT)
        self.find_job(request)  # it may have expired
        chunks = [{"output": chunk} for chunk in job.chunks[job.chunks_read :]]
        job.chunks_read = len(job.chunks)
        error = {"error": job.result["error"]} if "error" in job.result else {}
        return reply({"status": job.status, "stream": chunks, **error})

    async def change(self, act: Callable[[Job], None], request: Request) -> Response:
        job = self.find_job(request)
        act(job)
        return reply({"id": job.id, "status": job.status})

    async def purge(self, request: Request) -> Response:
        return reply({"removed": self.queue.purge(), "status": "completed"})

    async def health(self, request: Request) -> Response:
        return reply(self.queue.health())

    async def openai(self, request: Request) -> Response:
        body = await read_json(request) if await request.body() else None
        content = {"openai_route": f"/{request.path_params['path']}"} | ({} if body is None else {"openai_input": body})
        job = self.queue.submit({"input": content}, sync=False)
        is_stream = isinstance(body, dict) and bool(body.get("stream"))

        def has_begun() -> bool:
            return job.is_over or (is_stream and bool(job.chunks))

        while not has_begun() and not await request.is_disconnected():
            await job.change.wait_until(has_begun, DISCONNECT_CHECK)
        if is_stream and job.chunks:
            cleanup = BackgroundTask(self._end_stream, job)
            return StreamingResponse(_stream_text(job), media_type="text/event-stream", background=cleanup)
        if is_stream:
            await self._end_stream(job)
        return _reply_result(job, "text/event-stream" if is_stream else "text/plain")

    async def _end_stream(self, job: Job) -> None:
        """Ends a stream whose job is over, or whose client has left."""
        self.queue.cancel(job)


async def read_json(request: Request, limit: int = JOB_LIMITS[False]) -> Any:
    body = await request.body()
    if len(body) > limit:
        raise HTTPException(413, f"the body is larger than {limit} bytes")
    return parse_json(body)


def read_number(request: Request, name: str, default: int, minimum: int, maximum: int) -> int:
    """Returns a number of the query. Raises BadRequest where it is none within the limits."""
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or not minimum <= int(text) <= maximum:
        raise BadRequest(f"{name} must be a whole number from {minimum} to {maximum}")
    return int(text)


async def reply_error(request: Request, error: Exception) -> Response:
    """Answers what is wrong with a request, which starlette or the queue knows."""
    if isinstance(error, HTTPException):
        return reply({"error": error.detail}, error.status_code)
    return reply({"error": str(error)}, 400)


async def _stream_text(job: Job) -> AsyncIterator[bytes]:
    """Yields what the chunks say, as they come, until the job is over."""
    chunks_read = 0
    while not job.is_over or len(job.chunks) > chunks_read:
        await job.change.wait_until(lambda: job.is_over or len(job.chunks) > chunks_read)  # noqa: B023 - awaited here
        chunks = job.chunks[chunks_read:]
        chunks_read += len(chunks)
        text = "".join(chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks)
        yield text.encode(errors="replace")


def _reply_result(job: Job, text_type: str) -> Response:
    """Answers for a job that has streamed nothing. Text that is JSON says so in its content type."""
    if job.status not in (Status.COMPLETED, Status.FAILED):
        return reply({"error": f"job {job.status}"}, 500)
    status, name = (500, "error") if job.status is Status.FAILED else (200, "output")
    content = job.result.get(name)
    parts: list[Any] = content if isinstance(content, list) and content else [content]
    if not all(isinstance(part, str) for part in parts):
        return reply(parts[0] if len(parts) == 1 else parts, status)
    text = "".join(parts).encode(errors="replace")
    try:
        parse_json(text)
    except BadRequest:
        return Response(text, status, media_type=text_type)
    return Response(text, status, media_type="application/json")


# The process


class Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: object) -> None:
        """Exits at once: nothing in here outlives the process, so there is nothing to wait for, open polls included."""
        os._exit(0)


def _follow_parent(guard: KeyGuard) -> None:
    """Takes other keys for clients from standard input (`keys KEY,KEY`), and leaves where that ends."""
    for line in sys.stdin:
        if line.startswith("keys "):
            guard.client_keys = list(filter(None, line[5:].strip().split(",")))
    os._exit(0)


def main(simulator_class: type[Simulator] = Simulator) -> None:
    parser = argparse.ArgumentParser(description="RunPod's queue on a laptop.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--fd", type=int, help="a socket that is bound already, instead of host and port")
    parser.add_argument("--endpoint", default="local", help="the endpoint's id (default: local)")
    parser.add_argument("--hold", type=float, default=20.0, help="seconds for which an empty poll stays open (20)")
    parser.add_argument("--lost-after", type=float, default=40.0, help="seconds without a ping that names the job (40)")
    parser.add_argument("--with-parent", action="store_true", help="leave when standard input ends")
    options = parser.parse_args()
    # Made of its number, a socket asks for its protocol, which `create_server` and uvicorn leave out: asyncio turns
    # Nagle off only where it sees TCP, and answers written in two parts would take 40 ms.
    listener = socket.socket(fileno=_listen(options.host, options.port) if options.fd is None else options.fd)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # uvicorn's own mistakes only
    # A job is read as RunPod hands it on: how deep and how long its values may be is the worker's to bear.
    sys.setrecursionlimit(20_000)
    sys.set_int_max_str_digits(0)
    clients, workers = (list(filter(None, os.environ.get(name, "").split(","))) for name in (CLIENT_KEYS, WORKER_KEY))
    guard = KeyGuard(simulator_class(Queue(options.hold, options.lost_after)).app(options.endpoint), clients, workers)
    if options.with_parent:
        threading.Thread(target=_follow_parent, args=(guard,), daemon=True).start()
    config = uvicorn.Config(
        guard,
        http=WireProtocol,
        ws="none",
        loop="asyncio",  # it writes at once, so that a closed connection shows in the write
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE,
    )
    host, port = listener.getsockname()[:2]
    print(f"simulator: http://{host}:{port}/v2/{options.endpoint}", flush=True)
    Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> int:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).detach()
    except OSError as error:
        sys.exit(f"simulator: cannot listen: {error.strerror}")


if __name__ == "__main__":
    main()
