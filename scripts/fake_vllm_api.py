"""The API server of the stand-in for `vllm serve`: run by scripts/fake_vllm, whose docstring says what it promises."""

# ruff: noqa: E402, PTH123
from __future__ import annotations

import sys

sys.modules["ssl"] = None  # type: ignore[assignment] # asyncio does without it, and starts sooner

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import select
import signal
import socket
import termios
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http import HTTPStatus
from itertools import islice
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote

# The script that runs us: its children need nothing of what is here.
from fake_vllm import (
    EARLY_ENGINE,
    ENGINE_DEAD,
    JSON,
    MESSAGE_LIMIT,
    VERSION,
    Segment,
    log,
    spawn,
    start_engine,
    write_log,
)

Headers = list[tuple[str, str]]

# -- what was asked for: the command line and the plan


@dataclass(frozen=True)
class Options:
    """The few options of `vllm serve` that change what this program does; all others are accepted and ignored."""

    model: str
    names: list[str]
    uds: str
    host: str
    port: int
    max_model_len: int
    max_num_seqs: int
    shutdown_timeout: int
    request_id_headers: bool
    access_log: bool
    log_stats: bool
    sse_keep_alive: int  # seconds; 0: no comments
    root_path: str
    allowed_origins: list[str]
    headless: bool
    ranks: JSON  # nnodes, rank, master_addr, master_port


def usage_error(message: str) -> NoReturn:
    write_log(f"usage: vllm serve [model_tag] [options]\nvllm: error: {message}\n".encode(), 2)
    sys.exit(2)


def parse_token_count(text: str) -> int:
    """Returns a number of tokens, written as vLLM allows: 4096, 4k (thousands), 4K (of 1024), auto or -1."""
    if text in ("auto", "-1"):
        return 32768
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text)):
        usage_error(f"argument --max-model-len: invalid human_readable_int_or_auto value: '{text}'")
    return int(float(match[1]) * {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}[match[2]])


def read_options(args: list[str], reject: Iterable[str]) -> Options:
    positionals: list[str] = []
    flags: dict[str, list[str]] = {}
    values = positionals
    for arg in args:
        if re.match(r"--?[A-Za-z]", arg):
            name, equals, value = arg.partition("=")
            values = flags[name.replace("_", "-")] = [value] if equals else []
        else:
            values.append(arg)
    if rejected := [name for name in flags if name in reject]:
        usage_error(f"unrecognized arguments: {' '.join(rejected)}")

    def read_value(name: str, default: str) -> str:
        if flags.get(name) == []:
            usage_error(f"argument {name}: expected one argument")
        return flags.get(name, [default])[-1]

    def read_number(name: str, default: int) -> int:
        if not re.fullmatch(r"-?\d+", text := read_value(name, str(default))):
            usage_error(f"argument {name}: invalid int value: '{text}'")
        return int(text)

    try:
        origins = json.loads(read_value("--allowed-origins", "[]"))
    except ValueError as problem:
        usage_error(f"argument --allowed-origins: {problem}")
    model = positionals[0] if positionals else read_value("--model", "Qwen/Qwen3-0.6B")
    return Options(
        model=model,
        names=flags.get("--served-model-name") or [model],
        uds=read_value("--uds", ""),
        host=read_value("--host", ""),
        port=read_number("--port", 8000),
        max_model_len=parse_token_count(read_value("--max-model-len", "auto")),
        max_num_seqs=read_number("--max-num-seqs", 256),
        shutdown_timeout=read_number("--shutdown-timeout", 0),
        request_id_headers="--enable-request-id-headers" in flags,
        access_log="--disable-uvicorn-access-log" not in flags,
        log_stats="--disable-log-stats" not in flags,
        sse_keep_alive=read_number("--sse-keep-alive-interval", 0),
        root_path=read_value("--root-path", "").rstrip("/"),
        allowed_origins=origins,
        headless="--headless" in flags,
        ranks={
            "nnodes": read_number("--nnodes", 1),
            "rank": read_number("--node-rank", 0),
            "master_addr": read_value("--master-addr", "127.0.0.1"),
            "master_port": read_number("--master-port", 29501),
        },
    )


PER_REQUEST = {"per_request": True}


@dataclass(frozen=True)
class Plan:
    """The faults of a start: each key of a plan is a field here (docs/development/fake_vllm.md). -1 means never."""

    load_seconds: float = 0.0
    die_at_start: JSON = field(default_factory=dict)  # log, code or signal, after
    reject_flags: list[str] = field(default_factory=list)
    health_delay: float = 0.0
    metrics_delays: list[float] = field(default_factory=list)
    slow_accept: float = 0.0
    keepalive: float = 5.0
    ignore_sigterm: bool = False
    leave_orphan: bool = False
    worker_helper: bool = False
    exit_delay_after_engine_death: float = 2.0
    shm: int = 0
    log_flood: float = 0.0
    log_binary: bool = False
    die_after_requests: int = -1
    die_after_tokens: int = field(default=-1, metadata=PER_REQUEST)
    freeze_after_tokens: int = field(default=-1, metadata=PER_REQUEST)
    how: str = field(default="engine", metadata=PER_REQUEST)
    token_interval: float = field(default=0.0, metadata=PER_REQUEST)
    prefill_seconds: float = field(default=0.0, metadata=PER_REQUEST)
    prefill_steps: int = field(default=0, metadata=PER_REQUEST)
    split_utf8: bool = field(default=False, metadata=PER_REQUEST)
    binary: bool = field(default=False, metadata=PER_REQUEST)
    close_connection_after_response: bool = field(default=False, metadata=PER_REQUEST)
    close_silently: bool = field(default=False, metadata=PER_REQUEST)

    def replace_keys(self, keys: object, per_request: bool = False) -> Plan:
        """Returns this plan with some keys replaced. An unknown key or a value of the wrong type raises ValueError."""
        if not isinstance(keys, dict):
            raise ValueError("a plan is a JSON object")  # noqa: TRY004 - it is the user's text that is wrong
        allowed = {entry.name for entry in dataclasses.fields(self) if entry.metadata or not per_request}
        for key, value in keys.items():
            kind = type(getattr(self, key)) if key in allowed else None
            if not kind or type(value) not in ((float, int) if kind is float else (kind,)):
                raise ValueError(f"unknown key, or not of type {kind.__name__}: {key}" if kind else f"unknown: {key}")
            if key == "how" and not re.fullmatch(r"engine|api|exit:\d+|signal:\d+", value):
                raise ValueError(f"how: engine, api, exit:CODE or signal:N, not {value!r}")
        return dataclasses.replace(self, **keys)


def read_plan() -> tuple[Plan, int]:
    """Returns the plan for this start, and the start's number (counted in the file FAKE_VLLM_COUNT, from 1)."""
    start = 1
    if count_file := os.environ.get("FAKE_VLLM_COUNT"):
        with open(count_file, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            start = int(file.read() or 0) + 1
            file.truncate(0)
            file.write(str(start))
    text = os.environ.get("FAKE_VLLM_PLAN", "").strip()
    if text and text[0] not in "[{":
        with open(text) as file:
            text = file.read()
    plans = json.loads(text or "{}")
    plans = plans if isinstance(plans, list) else [plans]
    plan = Plan(keepalive=float(os.environ.get("FAKE_VLLM_KEEPALIVE", "5")))
    return plan.replace_keys(plans[min(start, len(plans)) - 1] if plans else {}), start


# -- HTTP/1.1 by hand


class Refusal(Exception):
    """An answer other than the wanted one. `body` is sent as JSON, and None means an empty body."""

    def __init__(self, status: int, body: JSON | None, headers: Headers | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or []


def error(code: int, message: str, kind: str, param: str | None = None) -> JSON:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None) -> Refusal:
    return Refusal(400, error(400, message, "BadRequestError", param))


def parse_size(text: str, base: int = 10) -> int:
    if not re.fullmatch(r"[0-9A-Fa-f]+", text.strip()):  # int() would take signs, underscores and 0x
        raise ValueError(f"not a length: {text!r}")
    return int(text, base)


class Request:
    """A request whose head has been parsed. Its body is read on demand."""

    def __init__(self, connection: Connection, head: bytes) -> None:
        self.connection = connection
        start, *lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"([!-~]+) ([!-\xff]+) HTTP/(\d\.\d)", start)
        if not match or any(":" not in line for line in lines):
            raise Refusal(400, None)
        self.method, self.target, self.version = str(match[1]), str(match[2]), str(match[3])
        self.headers = [(name, value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines)]
        self.path, _, query = self.target.partition("?")
        self.query = dict(parse_qsl(query, keep_blank_values=True))
        self.is_http10 = self.version == "1.0"
        self.is_last = self.is_http10 or "close" in self.header("connection").lower()
        self.is_answered = False
        self.trailers: Headers = []
        self.rate = 0.0  # bytes per second at which the body is read; 0: no limit
        self.body = self.read_body()  # one generator, so that whoever comes later reads on where another stopped

    def header(self, name: str) -> str:
        return ", ".join(value for key, value in self.headers if key.lower() == name)

    async def read_body(self) -> AsyncIterator[bytes]:
        connection = self.connection
        is_chunked = "chunked" in self.header("transfer-encoding").lower()
        remaining = 0 if is_chunked else parse_size(self.header("content-length") or "0")
        if "100-continue" in self.header("expect").lower() and not self.is_http10:
            if self.is_answered:  # without a 100 nobody can tell whether the body will come
                raise Refusal(417, None)
            connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while is_chunked or remaining:
            if not remaining:
                remaining = parse_size((await connection.read_line()).split(b";")[0].decode(), 16)
            if is_chunked and not remaining:
                break
            piece = await connection.read_some(min(remaining, int(self.rate / 20) + 1 if self.rate else 65536))
            remaining -= len(piece)
            if is_chunked and not remaining:
                await connection.read_line()
            yield piece
            if self.rate:
                await asyncio.sleep(len(piece) / self.rate)
        while is_chunked and (line := (await connection.read_line()).decode("latin-1")):
            name, _, value = line.partition(":")
            self.trailers.append((name, value.strip(" \t")))

    async def read_json(self) -> JSON:
        try:
            value = json.loads(b"".join([piece async for piece in self.body]))
        except ValueError as problem:
            raise bad_request(f"The body is not valid JSON: {problem}") from None
        if not isinstance(value, dict):
            raise bad_request("The body must be a JSON object")
        return value


class Connection(asyncio.Protocol):
    """A client's connection. Its requests are served in turn; when the client leaves, the work for it is cancelled."""

    HIGH_WATER = 65536
    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server, self.loop = server, asyncio.get_running_loop()
        self.buffer = bytearray()
        self.data_arrival: asyncio.Future[None] | None = None
        self.idle_timer: asyncio.TimerHandle | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self.is_busy, self.request_count = False, 0
        self.stream: Stream | None = None

    # called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.connection_count += 1
        self.serial = self.server.connection_count
        self.server.connections.add(self)
        self.task = self.loop.create_task(self.serve())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) > self.HIGH_WATER:
            self.transport.pause_reading()
        if self.idle_timer:
            self.idle_timer.cancel()
        if self.data_arrival and not self.data_arrival.done():
            self.data_arrival.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self.writable.set()  # nobody shall wait for a client that has gone
        self.task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()
        if self.stream:
            self.stream.write_words()

    # called by handlers

    async def wait_for_data(self) -> None:
        self.transport.resume_reading()
        self.data_arrival = self.loop.create_future()
        await self.data_arrival

    async def read_some(self, limit: int) -> bytes:
        while not self.buffer:
            await self.wait_for_data()
        piece = bytes(self.buffer[:limit])
        del self.buffer[:limit]
        return piece

    async def read_line(self, end: bytes = b"\r\n") -> bytes:
        while (at := self.buffer.find(end)) < 0:
            if len(self.buffer) > self.HIGH_WATER:
                raise Refusal(431, None)
            await self.wait_for_data()
        line = bytes(self.buffer[:at])
        del self.buffer[: at + len(end)]
        return line

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    async def write_in_parts(self, *parts: bytes) -> None:
        """Writes so that no read of the client sees two parts in one: it waits until each is taken, at most 20 ms."""
        fd = self.transport.get_extra_info("socket").fileno()
        for part in parts:
            self.write(part)
            await self.writable.wait()
            for _ in range(20):
                await asyncio.sleep(0.001)
                if self.transport.is_closing() or not any(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4))):
                    break

    async def serve(self) -> None:
        request, keep_open = None, True
        try:
            while keep_open and not self.server.is_draining:
                head, request = b"", None
                while not head.strip():
                    head = await self.read_line(b"\r\n\r\n")
                self.is_busy = True
                self.request_count += 1
                request = Request(self, head.lstrip())
                if keep_open := await self.server.handle(request):
                    async for _ in request.body:
                        pass
                self.is_busy = False
                if not self.buffer:
                    self.idle_timer = self.loop.call_later(self.server.plan.keepalive, self.transport.close)
        except (Refusal, ValueError) as problem:  # not HTTP, or a body whose end can't be found
            if not request or not request.is_answered:
                self.write_head(problem.status if isinstance(problem, Refusal) else 400, [("connection", "close")])
        except asyncio.CancelledError:  # the client has gone
            pass
        finally:
            self.transport.close()

    def write_head(self, status: int, headers: Headers, request: Request | None = None) -> None:
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        lines = [f"HTTP/1.1 {status} {phrase}", f"date: {date}", "server: uvicorn"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if request:
            request.is_answered = True
            if self.server.options.access_log:
                request_line = f"{request.method} {request.target} HTTP/{request.version}"
                self.server.log_uvicorn(f'{self.serial} - "{request_line}" {status} {phrase}', fd=1)


# -- /metrics

# prometheus_client and the HTTP server write these whatever the options are. They say nothing about the engine.
BASE_METRICS = """\
# HELP python_info Python platform information
# TYPE python_info gauge
python_info{{implementation="CPython",major="3",minor="11",patchlevel="7",version="3.11.7"}} 1.0
# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total {seconds}
# HELP http_requests_total Total number of requests by method, status and handler.
# TYPE http_requests_total counter
"""


def escape_label(value: str) -> str:
    """Returns the value of a label, escaped as prometheus_client does it."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# -- answers: words, and the shapes that the APIs wrap around them

# Every second word has a character of several bytes, so that any two tokens have one to cut through.
WORDS = ["the ", "naïve ", "model ", "日本 ", "says ", "🙂 ", "and ", "Füße ", "token ", "Ωmega ", 'a "quote" ', "é\n"]
ESCAPED = [json.dumps(word, ensure_ascii=False)[1:-1].encode() for word in WORDS]
MARK = "@word@"
NUMBER_MARK, QUOTED_NUMBER_MARK = b"@number@", b'"@number@"'
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEPT_ALIVE_ROUTES = ("/v1/chat/completions", "/v1/completions")  # vLLM's other streams have no comments
MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def extract_text(value: object) -> str:
    """Returns all the text inside a prompt, a list of messages, or a list of parts."""
    if isinstance(value, list):
        return " ".join(extract_text(item) for item in value)
    if isinstance(value, dict):
        return extract_text([value[key] for key in ("content", "text") if key in value])
    return "" if value is None else str(value)


def sse_event(data: JSON, kind: str = "") -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {kind}\n" if kind else "").encode() + f"data: {text}\n\n".encode()


def event(kind: str, **data: object) -> bytes:
    return sse_event({"type": kind, **data}, kind)


def numbered_event(kind: str, **data: object) -> bytes:
    """Returns an event of /v1/responses. It has a number in its stream, which is put in when it is sent."""
    return event(kind, **data, sequence_number=NUMBER_MARK.decode()).replace(QUOTED_NUMBER_MARK, NUMBER_MARK)


@dataclass
class GenerationParams:
    """The parameters that an answer is made from."""

    body: JSON
    ident: str
    model: str
    prompt: str
    prompt_tokens: int
    token_count: int

    def __post_init__(self) -> None:
        self.seed = binascii.crc32(self.prompt.encode())
        self.text = "".join(WORDS[(self.seed + i) % len(WORDS)] for i in range(self.token_count))
        self.hits_limit = any(name in self.body for name in MAX_TOKENS_FIELDS)
        self.created = int(time.time())


@dataclass
class Answer:
    """An answer in one dialect. All of it but the timing is known beforehand."""

    response: JSON
    opening: bytes
    word_event: bytes  # it has MARK where the word goes
    closing: bytes
    failure: bytes  # how a stream ends when the engine is gone
    greeting: bytes = b""  # events that the API server sends with the head, before the engine has done anything


def openai_answer(params: GenerationParams, kind: str, chunk_kind: str, contents: list[JSON]) -> Answer:
    """`contents`: what choice 0 holds in the whole answer, in a word's event, in the last event, in the first event."""
    reason = "length" if params.hits_limit else "stop"
    usage: JSON = {"prompt_tokens": params.prompt_tokens, "completion_tokens": params.token_count}
    usage["total_tokens"] = params.prompt_tokens + params.token_count

    def make_object(kind: str, content: JSON | None, reason: str | None, **more: object) -> JSON:
        choice = {"index": 0, **(content or {}), "logprobs": None, "finish_reason": reason}
        base = {"id": params.ident, "object": kind, "created": params.created, "model": params.model}
        return {**base, "choices": [] if content is None else [choice], **more}

    wants_usage = (params.body.get("stream_options") or {}).get("include_usage")
    return Answer(
        response=make_object(kind, contents[0], reason, usage=usage),
        opening=b"".join(sse_event(make_object(chunk_kind, content, None)) for content in contents[3:]),
        word_event=sse_event(make_object(chunk_kind, contents[1], None)),
        closing=sse_event(make_object(chunk_kind, contents[2], reason))
        + (sse_event(make_object(chunk_kind, None, None, usage=usage)) if wants_usage else b"")
        + DONE,
        failure=sse_event(error(500, ENGINE_DEAD, "InternalServerError")) + DONE,
    )


def chat(params: GenerationParams) -> Answer:
    whole = {"message": {"role": "assistant", "content": params.text, "tool_calls": []}}
    deltas = [{"delta": {"content": MARK}}, {"delta": {"content": ""}}, {"delta": {"role": "assistant", "content": ""}}]
    return openai_answer(params, "chat.completion", "chat.completion.chunk", [whole, *deltas])


def completion(params: GenerationParams) -> Answer:
    return openai_answer(
        params, "text_completion", "text_completion", [{"text": params.text}, {"text": MARK}, {"text": ""}]
    )


def anthropic(params: GenerationParams) -> Answer:
    end = {"stop_reason": "max_tokens" if params.hits_limit else "end_turn", "stop_sequence": None}
    usage = {"input_tokens": params.prompt_tokens, "output_tokens": params.token_count}
    message = {"id": params.ident, "type": "message", "role": "assistant", "model": params.model}
    empty: JSON = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 0}}
    return Answer(
        response={**message, "content": [{"type": "text", "text": params.text}], **end, "usage": usage},
        opening=event("message_start", message=empty)
        + event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        word_event=event("content_block_delta", index=0, delta={"type": "text_delta", "text": MARK}),
        closing=event("content_block_stop", index=0)
        + event("message_delta", delta=end, usage=usage)
        + event("message_stop"),
        failure=event("error", error={"type": "internal_error", "message": ENGINE_DEAD}) + event("message_stop"),
    )


def responses(params: GenerationParams) -> Answer:
    place: JSON = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": params.text, "annotations": [], "logprobs": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    whole = {"id": params.ident, "object": "response", "created_at": params.created, "model": params.model}
    whole |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None}
    begun: JSON = {**whole, "status": "in_progress", "output": []}
    usage: JSON = {"input_tokens": params.prompt_tokens, "input_tokens_details": {"cached_tokens": 0}}
    usage |= {"output_tokens": params.token_count, "output_tokens_details": {"reasoning_tokens": 0}}
    usage["total_tokens"] = params.prompt_tokens + params.token_count
    whole |= {"status": "completed", "output": [item], "usage": usage}
    no_item, no_part = {**item, "status": "in_progress", "content": []}, {**part, "text": ""}
    return Answer(
        response=whole,
        greeting=numbered_event("response.created", response=begun)
        + numbered_event("response.in_progress", response=begun),
        opening=numbered_event("response.output_item.added", output_index=0, item=no_item)
        + numbered_event("response.content_part.added", **place, part=no_part),
        word_event=numbered_event("response.output_text.delta", **place, logprobs=[], delta=MARK),
        closing=numbered_event("response.output_text.done", **place, logprobs=[], text=params.text)
        + numbered_event("response.content_part.done", **place, part=part)
        + numbered_event("response.output_item.done", output_index=0, item=item)
        + numbered_event("response.completed", response=whole),
        failure=numbered_event("error", code="500", message=ENGINE_DEAD, param=None),
    )


# path -> (shape, prefix of its ids, field of the prompt)
DIALECTS: dict[str, tuple[Callable[[GenerationParams], Answer], str, str]] = {
    "/v1/chat/completions": (chat, "chatcmpl-", "messages"),
    "/v1/completions": (completion, "cmpl-", "prompt"),
    "/v1/messages": (anthropic, "chatcmpl-", "messages"),
    "/v1/responses": (responses, "resp_", "input"),
}


# -- the API server's side of the engine


class Stream:
    """A generation under way. If its answer is not streamed, the words are only counted. The engine doesn't wait for a
    client that doesn't read: the words that it has made are sent when there is room."""

    def __init__(self, server: Server, request: Request, params: GenerationParams, answer: Answer) -> None:
        self.server, self.params, self.answer = server, params, answer
        self.connection, self.is_chunked = request.connection, not request.is_http10
        self.ident, self.is_streamed = server.request_count, bool(params.body.get("stream"))
        self.faults = server.read_faults(request)
        self.prefix, _, self.suffix = answer.word_event.partition(MARK.encode())
        self.tokens_made = self.tokens_sent = 0
        self.written_at = server.loop.time()
        self.unread_pieces = max(0, self.faults.prefill_steps)  # steps of the prefill
        self.prefill_interval = self.faults.prefill_seconds / (self.unread_pieces + 1)
        self.due_at = self.written_at + self.prefill_interval
        self.event_count = 0  # only of events with a number
        self.split_task: asyncio.Task[None] | None = None
        self.outcome: asyncio.Future[bool] = server.loop.create_future()  # True: all words are sent; False: no engine

    def is_runnable(self) -> bool:
        return not self.split_task and not self.outcome.done()

    def frame(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data

    def number_events(self, data: bytes) -> bytes:
        while NUMBER_MARK in data:
            data = data.replace(NUMBER_MARK, b"%d" % self.event_count, 1)
            self.event_count += 1
        return data

    def advance(self, now: float) -> None:
        """Notes that the engine has read a piece of the prompt, or made one more token."""
        if self.unread_pieces:
            self.unread_pieces -= 1
            self.due_at = max(self.due_at + self.prefill_interval, now)
            return
        self.tokens_made += 1
        self.due_at = max(self.due_at + self.faults.token_interval, now)
        self.write_words()

    def write_words(self) -> None:
        """Sends the words that have been made, as far as the client takes them."""
        while (
            self.tokens_sent < self.tokens_made
            and not self.split_task
            and (self.connection.writable.is_set() or not self.is_streamed)
        ):
            word = ESCAPED[(self.params.seed + self.tokens_sent) % len(ESCAPED)]
            self.tokens_sent += 1
            self.written_at = self.server.loop.time()
            if not self.is_streamed:
                self.word_written()
                continue
            if self.tokens_sent == 1 and self.answer.opening:
                self.connection.write(self.frame(self.number_events(self.answer.opening)))
            data = self.prefix + word + (b"\xff\xfe" if self.faults.binary else b"") + self.number_events(self.suffix)
            if self.faults.split_utf8 and (wide := re.search(rb"[\xc0-\xff]", word)):
                self.split_task = self.server.loop.create_task(self.write_split(data, len(self.prefix) + wide.end()))
            else:
                self.connection.write(self.frame(data))
                self.word_written()

    async def write_split(self, data: bytes, offset: int) -> None:
        await self.connection.write_in_parts(self.frame(data[:offset]), self.frame(data[offset:]))
        self.split_task = None
        self.word_written()
        self.write_words()
        self.server.engine.send_order()

    async def send_comments(self, interval: float) -> None:
        """Sends a comment after each silence of `interval` seconds. The engine has no part in it, dead or alive."""
        while True:
            await asyncio.sleep(self.written_at + interval - self.server.loop.time())
            await self.connection.writable.wait()
            if self.split_task:
                await self.split_task
            if (now := self.server.loop.time()) >= self.written_at + interval:
                self.written_at = now
                self.connection.write(self.frame(KEEP_ALIVE))

    def word_written(self) -> None:
        self.server.tokens_written += 1
        for plan, count in ((self.faults, self.tokens_sent), (self.server.plan, self.server.tokens_written)):
            if plan.die_after_tokens == count and plan.how != "engine":
                self.server.die(plan.how)
        if self.tokens_sent >= self.params.token_count and not self.outcome.done():
            self.outcome.set_result(True)


class Engine:
    """The link to the engine process. It asks for tokens: one message for all streams that are due, never two open."""

    def __init__(self, server: Server) -> None:
        self.server, plan = server, server.plan
        self.pid: int
        self.channel: socket.socket
        self.pid, self.channel = EARLY_ENGINE or start_engine()
        self.channel.setblocking(False)
        config = {
            "load_seconds": None if plan.die_at_start else plan.load_seconds,
            "max_num_seqs": server.options.max_num_seqs,
            "die_after": plan.die_after_tokens if plan.how == "engine" else -1,
            "freeze_after": plan.freeze_after_tokens,
            "shm": plan.shm,
            "worker_has": ["helper"] if plan.worker_helper else [],
            **server.options.ranks,
        }
        self.channel.send(json.dumps(config).encode())
        self.worker_pid = 0
        self.ready: asyncio.Future[bool] = server.loop.create_future()
        self.is_dead = False
        self.counters = [0, 0, 0, 0, 0, 0]
        self.streams: dict[int, Stream] = {}
        self.additions: list[list[int]] = []
        self.removals: list[int] = []
        self.awaited_streams: list[Stream] | None = None  # None: no reply is awaited
        self.timer: asyncio.TimerHandle | None = None
        server.loop.add_reader(self.channel, self.reply_received)

    def add(self, stream: Stream) -> None:
        self.streams[stream.ident] = stream
        die = stream.faults.die_after_tokens if stream.faults.how == "engine" else -1
        self.additions.append([stream.ident, stream.params.prompt_tokens, die, stream.faults.freeze_after_tokens])
        if self.is_dead:
            stream.outcome.set_result(False)
        self.send_order()

    def forget(self, stream: Stream) -> None:
        if self.streams.pop(stream.ident, None):
            self.removals.append(stream.ident)

    def drop(self, stream: Stream) -> None:
        self.forget(stream)
        self.send_order()

    def send_order(self) -> None:
        """Sends which streams are new, have ended or are due, unless a reply is awaited."""
        if self.awaited_streams is not None or self.is_dead:
            return
        if self.timer:
            self.timer.cancel()
        now, soonest, due_streams = self.server.loop.time(), float("inf"), list[Stream]()
        for stream in islice(self.streams.values(), self.server.options.max_num_seqs):
            if stream.due_at > now + 0.001:
                soonest = min(soonest, stream.due_at)
            elif stream.is_runnable():
                due_streams.append(stream)
        if due_streams or self.additions or self.removals:
            order = {"add": self.additions, "drop": self.removals}
            order |= {"read": [stream.ident for stream in due_streams if stream.unread_pieces]}
            order |= {"step": [stream.ident for stream in due_streams if not stream.unread_pieces]}
            self.awaited_streams, self.additions, self.removals = due_streams, [], []
            with contextlib.suppress(OSError):  # it has just died, which reply_received will see
                self.channel.send(json.dumps(order).encode())
        elif soonest < float("inf"):
            self.timer = self.server.loop.call_at(soonest, self.send_order)

    def reply_received(self) -> None:
        try:
            reply = self.channel.recv(MESSAGE_LIMIT)
        except OSError:
            reply = b""
        if not reply:
            self.engine_died()
        elif not self.worker_pid:
            self.worker_pid = int(reply)
            self.ready.set_result(True)
        else:
            self.counters = json.loads(reply)
            streams, self.awaited_streams = self.awaited_streams or [], None
            now = self.server.loop.time()
            for stream in streams:
                if stream.ident in self.streams:
                    stream.advance(now)
                    if stream.tokens_made == stream.params.token_count:
                        self.forget(stream)
            self.send_order()

    def engine_died(self) -> None:
        """Ends every stream now, and the API server soon afterwards, with code 0."""
        loop = self.server.loop
        self.is_dead = True
        loop.remove_reader(self.channel)
        if not self.ready.done():
            self.ready.set_result(False)
        log("AsyncLLM output_handler failed: EngineCore died unexpectedly.", "async_llm.py:1", level="ERROR")
        self.fail_streams()
        loop.call_later(0.05, self.reap)
        loop.call_later(self.server.plan.exit_delay_after_engine_death, os._exit, 0)

    def fail_streams(self) -> None:
        for stream in self.streams.values():
            if not stream.outcome.done():
                stream.outcome.set_result(False)

    def reap(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self.pid, os.WNOHANG) != (0, 0)
        return True

    def kill(self, number: int) -> None:
        if not self.is_dead:  # else its pid may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self) -> None:
        """Terminates the engine and, through it, the worker. Kills both if that takes longer than half a second."""
        self.kill(signal.SIGTERM)
        for _ in range(100):
            if self.is_dead or self.reap():
                return
            time.sleep(0.005)
        self.kill(signal.SIGKILL)
        if self.worker_pid:
            os.kill(self.worker_pid, signal.SIGKILL)


# -- the API server: its life and its routes

KV_BLOCKS = 10_000
WEBSOCKET = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
UNCOUNTED_ROUTES = ("/metrics", "/health", "/ping", "/version")  # by vLLM's own http_requests_total


class Server:
    """The API server: the life of its process, and its routes."""

    def __init__(self, options: Options, plan: Plan, start: int, argv: list[str]) -> None:
        self.options, self.plan, self.start, self.argv = options, plan, start, argv
        # Counted limits are each request's own: it inherits none of the plan's.
        self.request_plan = dataclasses.replace(plan, die_after_tokens=-1, freeze_after_tokens=-1, how="engine")
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.connection_count = self.request_count = self.tokens_written = 0
        self.running_count = self.finished_count = self.aborted_count = self.scrape_count = 0
        self.answer_counts: Counter[tuple[str, str, int]] = Counter()  # route, method, status
        self.is_draining = False
        self.tasks: list[asyncio.Task[None]] = []
        for number in (signal.SIGTERM, signal.SIGINT):  # before the engine is told to begin: it must not outlive these
            self.loop.add_signal_handler(number, self.signal_received)
        self.listener = self.bind()
        self.segment = Segment(plan.shm)
        self.engine = Engine(self)

    def log_uvicorn(self, text: str, fd: int = 2) -> None:
        write_log(f"(APIServer pid={os.getpid()}) INFO:     {text}\n".encode(), fd)

    def bind(self) -> socket.socket:
        """Binds the socket before loading, and listens only after. As with vLLM, a stale socket file is an error."""
        path, host = self.options.uds, self.options.host
        address: Any = path or (host, self.options.port)
        listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setblocking(False)
        if not path:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as problem:
            write_log(f"OSError: {problem}\n".encode(), 2)
            sys.exit(1)
        return listener

    async def run(self) -> None:
        if self.plan.leave_orphan:
            spawn("VLLM::Orphan", "--as-orphan")
        self.tasks.append(self.loop.create_task(self.write_noise()))
        if death := self.plan.die_at_start:
            write_log("".join(f"{line}\n" for line in death.get("log", [])).encode(), 2)
            await asyncio.sleep(death.get("after", 0))
            self.die(f"signal:{death['signal']}" if "signal" in death else f"exit:{death.get('code', 1)}")
        if not await self.engine.ready:
            log("Engine core initialization failed. See root cause above.", "core_client.py:1", level="ERROR")
            os._exit(1)
        where = f"unix:{self.options.uds}" if self.options.uds else f"http://{self.options.host}:{self.options.port}"
        log(f"Starting vLLM server on {where}", "api_server.py:2")
        self.log_uvicorn(f"Started server process [{os.getpid()}]")
        if self.plan.slow_accept:
            self.listener.listen(2048)
            self.tasks.append(self.loop.create_task(self.accept_slowly()))
        else:
            await self.loop.create_server(lambda: Connection(self), sock=self.listener, backlog=2048)
        self.log_uvicorn("Application startup complete.")
        await self.loop.create_future()

    async def accept_slowly(self) -> None:
        while True:
            client, _ = await self.loop.sock_accept(self.listener)
            await asyncio.sleep(self.plan.slow_accept)
            await self.loop.connect_accepted_socket(lambda: Connection(self), client)

    async def write_noise(self) -> None:
        if self.plan.log_binary:
            write_log(b"\xff\xfe not UTF-8: \x80\x81\n" + b"x" * 200_000)
        started, count = self.loop.time(), 0
        while self.plan.log_flood:
            await asyncio.sleep(0.02)
            due = int((self.loop.time() - started) * self.plan.log_flood)
            write_log("".join(f"INFO flood line {i}\n" for i in range(count, due)).encode())
            count = due

    def die(self, how: str) -> None:
        kind, _, number = how.partition(":")
        DEATHS[kind](self, int(number or 0))

    def leave(self, code: int) -> NoReturn:
        """Exits and leaves no child and no segment behind. Only the socket file stays, as with vLLM."""
        self.engine.stop()
        self.segment.remove()
        os._exit(code)

    def signal_received(self) -> None:
        if self.plan.ignore_sigterm:
            log("A signal was ignored, as planned", "launcher.py:1", level="WARNING")
        elif not self.is_draining:
            self.is_draining = True
            self.tasks.append(self.loop.create_task(self.shut_down()))

    async def shut_down(self) -> None:
        timeout = self.options.shutdown_timeout
        mode = "drain" if timeout else "abort"
        log(f"[shutdown] API server: stopping engine client mode={mode} timeout={timeout}s", "launcher.py:2")
        self.loop.remove_reader(self.listener)
        self.listener.close()
        for patience in (timeout, 0.3):
            deadline = self.loop.time() + patience
            while self.loop.time() < deadline and self.has_busy_connections():  # noqa: ASYNC110 - kernel buffers set no event
                await asyncio.sleep(0.005)
            self.engine.fail_streams()
        self.log_uvicorn("Application shutdown complete.")
        self.leave(0)

    def has_busy_connections(self) -> bool:
        return any(each.is_busy or each.transport.get_write_buffer_size() for each in self.connections)

    # -- requests

    def read_faults(self, request: Request) -> Plan:
        text = request.header("x-fake")
        try:
            return self.request_plan.replace_keys(json.loads(text), per_request=True) if text else self.request_plan
        except ValueError as problem:
            raise bad_request(f"X-Fake: {problem}") from None

    async def handle(self, request: Request) -> bool:
        """Answers a request. Returns False if the connection can't be used again."""
        root = self.options.root_path
        if root and request.path.startswith(root + "/"):
            request.path = request.path[len(root) :]
        try:
            faults = self.read_faults(request)
            request.is_last |= faults.close_connection_after_response
            await self.find_handler(request)(self, request)
        except Refusal as refusal:
            self.respond(request, refusal.status, refusal.body, refusal.headers)
        except (ValueError, LookupError, TypeError, AttributeError) as problem:  # JSON of an unexpected shape
            if request.is_answered:
                return False
            request.is_last = True
            self.respond(request, 400, error(400, repr(problem), "BadRequestError"))
        else:
            return not request.is_last and not faults.close_silently
        return not request.is_last

    def find_handler(self, request: Request) -> Handler:
        path = unquote(request.path)
        if path.startswith(("/fake/echo/", "/fake/status/")):
            path = path[: path.index("/", 6)]
        methods = ROUTES.get(path)
        if methods is None:
            raise Refusal(404, {"detail": "Not Found"})
        handler = methods.get(request.method) or methods.get("ANY")
        if handler is None:
            raise Refusal(405, {"detail": "Method Not Allowed"}, [("allow", ", ".join(methods))])
        return handler

    def start_answer(self, request: Request, status: int, headers: Headers) -> None:
        path = unquote(request.path)
        if path not in UNCOUNTED_ROUTES:
            self.answer_counts[path if path in ROUTES else "none", request.method, status] += 1
        if self.options.request_id_headers and (ident := request.header("x-request-id")):
            headers = [*headers, ("x-request-id", ident)]
        if (origin := request.header("origin")) and (allowed := self.options.allowed_origins):
            value = "*" if "*" in allowed else origin if origin in allowed else ""
            headers = [*headers, *([("access-control-allow-origin", value)] if value else []), ("vary", "Origin")]
        request.connection.write_head(
            status, [*headers, *([("connection", "close")] if request.is_last else [])], request
        )

    def respond(
        self,
        request: Request,
        status: int,
        body: JSON | bytes | None = None,
        headers: Iterable[tuple[str, str]] = (),
        kind: str = "application/json",
    ) -> None:
        if isinstance(body, dict):
            body = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        data = b"" if body is None or status in (204, 304) else body
        length = [] if status in (204, 304) else [("content-length", str(len(data)))]
        self.start_answer(request, status, [*length, *([("content-type", kind)] if data else []), *headers])
        if request.method != "HEAD":
            request.connection.write(data)

    async def health(self, request: Request) -> None:
        await asyncio.sleep(self.plan.health_delay)
        self.respond(request, 503 if self.engine.is_dead else 200)

    async def version(self, request: Request) -> None:
        self.respond(request, 200, {"version": VERSION})

    async def models(self, request: Request) -> None:
        card = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "root": self.options.model}
        card |= {"parent": None, "max_model_len": self.options.max_model_len, "permission": []}
        self.respond(request, 200, {"object": "list", "data": [{"id": name, **card} for name in self.options.names]})

    async def metrics(self, request: Request) -> None:
        self.scrape_count += 1  # the client may leave before it is answered
        if delays := self.plan.metrics_delays:
            await asyncio.sleep(delays[(self.scrape_count - 1) % len(delays)])
        steps, tokens, prompt, running, waiting, blocks = self.engine.counters
        samples = [
            ("num_requests_running", "gauge", "", "", running),
            ("num_requests_waiting", "gauge", "", "", waiting),
            ("kv_cache_usage_perc", "gauge", "", "", blocks / KV_BLOCKS),
            ("prompt_tokens", "counter", "_total", "", prompt),
            ("generation_tokens", "counter", "_total", "", tokens),
            ("request_success", "counter", "_total", ',finished_reason="length"', self.finished_count),
            ("iteration_tokens_total", "histogram", "_bucket", ',le="+Inf"', steps),
            ("iteration_tokens_total", "", "_count", "", steps),
            ("iteration_tokens_total", "", "_sum", "", tokens + prompt),
        ]
        text, model = BASE_METRICS.format(seconds=time.process_time()), escape_label(self.options.names[0])
        for (route, method, status), count in self.answer_counts.items():
            text += f'http_requests_total{{handler="{route}",method="{method}",status="{status // 100}xx"}} {count}.0\n'
        for name, kind, suffix, labels, value in samples if self.options.log_stats else ():
            text += f"# HELP vllm:{name} A number of the fake.\n# TYPE vllm:{name} {kind}\n" if kind else ""
            text += f'vllm:{name}{suffix}{{engine="0",model_name="{model}"{labels}}} {float(value)}\n'
        self.respond(request, 200, text.encode(), kind="text/plain; version=0.0.4; charset=utf-8")

    def model_of(self, body: JSON) -> str:
        model = str(body.get("model") or self.options.names[0])
        if model not in self.options.names:
            raise Refusal(404, error(404, f"The model `{model}` does not exist.", "NotFoundError", "model"))
        return model

    async def tokenize(self, request: Request) -> None:
        body = await request.read_json()
        self.model_of(body)
        words = extract_text(body.get("prompt", body.get("messages"))).split()
        tokens = [binascii.crc32(word.encode()) % 32000 for word in words]
        answer = {"count": len(tokens), "max_model_len": self.options.max_model_len, "tokens": tokens}
        self.respond(request, 200, {**answer, "token_strs": None})

    async def count_tokens(self, request: Request) -> None:
        """Answers the token count of Anthropic's API."""
        body = await request.read_json()
        self.model_of(body)
        if body.get("messages") is None:
            raise bad_request("Field required: messages", "messages")
        words = f"{extract_text(body.get('system'))} {extract_text(body['messages'])}".split()
        self.respond(request, 200, {"input_tokens": max(1, len(words))})

    def parse_generation(self, request: Request, body: JSON) -> tuple[GenerationParams, Answer]:
        make_answer, prefix, prompt_field = DIALECTS[unquote(request.path)]
        model, prompt = self.model_of(body), extract_text(body.get(prompt_field))
        if body.get(prompt_field) is None:
            raise bad_request(f"Field required: {prompt_field}", prompt_field)
        count = next((body[name] for name in MAX_TOKENS_FIELDS if body.get(name) is not None), 16)
        if type(count) is not int or count < 1:
            raise bad_request(f"max_tokens must be at least 1, got {count!r}.", "max_tokens")
        prompt_tokens, limit = max(1, len(prompt.split())), self.options.max_model_len
        if prompt_tokens + count > limit:
            message = (
                f"This model's maximum context length is {limit} tokens, but {prompt_tokens} + {count} were asked."
            )
            raise bad_request(message, "input_tokens")
        ident = prefix + (request.header("x-request-id") or os.urandom(12).hex())
        params = GenerationParams(body, ident, model, prompt, prompt_tokens, count)
        return params, make_answer(params)

    async def generate(self, request: Request) -> None:
        body, connection = await request.read_json(), request.connection
        params, answer = self.parse_generation(request, body)
        if self.is_draining:
            raise Refusal(503, error(503, "The server is shutting down.", "ServiceUnavailableError"))
        self.request_count += 1
        stream = Stream(self, request, params, answer)
        for plan in (self.plan, stream.faults):  # what strikes before the first token
            if plan.die_after_tokens == 0 or 0 <= plan.die_after_requests < self.request_count:
                self.die(plan.how)
            if plan.freeze_after_tokens == 0:
                self.engine.kill(signal.SIGSTOP)
        self.running_count += 1
        connection.stream = stream
        comment_task: asyncio.Task[None] | None = None
        try:
            if stream.is_streamed:
                framing = [("transfer-encoding", "chunked")] if stream.is_chunked else []
                self.start_answer(request, 200, [("content-type", "text/event-stream; charset=utf-8"), *framing])
                if answer.greeting:
                    connection.write(stream.frame(stream.number_events(answer.greeting)))
                if (seconds := self.options.sse_keep_alive) and unquote(request.path) in KEPT_ALIVE_ROUTES:
                    comment_task = self.loop.create_task(stream.send_comments(seconds))
            self.engine.add(stream)
            is_complete = await stream.outcome
            if stream.split_task:
                await stream.split_task
        except asyncio.CancelledError:
            self.aborted_count += 1
            raise
        finally:
            self.running_count -= 1
            connection.stream = None
            if comment_task:
                comment_task.cancel()
            self.engine.drop(stream)
        self.finished_count += is_complete
        if stream.is_streamed:
            connection.write(stream.frame(stream.number_events(answer.closing if is_complete else answer.failure)))
            connection.write(b"0\r\n\r\n" if stream.is_chunked else b"")
        elif is_complete:
            self.respond(request, 200, answer.response)
        else:
            self.respond(request, 500, error(500, ENGINE_DEAD, "InternalServerError"))
        await connection.writable.wait()

    async def realtime(self, request: Request) -> None:
        """Opens a WebSocket on which nothing is sent. A close frame is answered."""
        if "websocket" not in request.header("upgrade").lower():
            raise Refusal(404, {"detail": "Not Found"})
        digest = sha1((request.header("sec-websocket-key") + WEBSOCKET).encode()).digest()
        switched = [("upgrade", "websocket"), ("connection", "Upgrade")]
        self.start_answer(request, 101, [*switched, ("sec-websocket-accept", base64.b64encode(digest).decode())])
        while (await request.connection.read_some(65536))[0] != 0x88:
            pass
        request.connection.write(b"\x88\x00")
        request.is_last = True

    # -- test routes: raw behaviours

    async def echo(self, request: Request) -> None:
        length, digest = await digest_body(request)
        answer: JSON = {"method": request.method, "target": request.target, "version": request.version}
        answer |= {"headers": request.headers, "trailers": request.trailers, "body_len": length, "body_sha256": digest}
        answer |= {"connection": request.connection.serial, "request": request.connection.request_count}
        self.respond(request, 200, answer, [("X-Fake-Connection", str(request.connection.serial))])

    async def raw(self, request: Request) -> None:
        connection, query = request.connection, request.query
        if "raw" in query:  # the script in the query, so that any method and any body will do
            script: JSON = json.loads(base64.urlsafe_b64decode(query["raw"] + "=="))
            remaining = 0 if "no-read-body" in query else script.get("after", float("inf"))
            while remaining > 0 and (piece := await anext(request.body, b"")):
                remaining -= len(piece)
        elif "no-read-body" in query:
            script = {"parts": [{"b64": base64.b64encode(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly")}]}
        else:
            script = await request.read_json()
        request.is_answered = True
        for part in script.get("parts", []):
            await asyncio.sleep(part.get("delay", 0))
            await connection.write_in_parts(base64.b64decode(part["b64"]))
        while script.get("echo"):  # say, after a 101: every byte comes back
            connection.write(await connection.read_some(65536))
        if script.get("close") == "reset":
            connection.transport.abort()
        request.is_last = bool(script.get("close"))

    async def binary(self, request: Request) -> None:
        query, connection = request.query, request.connection
        total, framing = int(query.get("n", 1024)), query.get("framing", "length")
        step, interval = int(query.get("chunk", 65536)), float(query.get("interval", 0))
        request.is_last |= framing == "close"
        framings = {
            "length": [("content-length", str(total))],
            "chunked": [("transfer-encoding", "chunked")],
            "close": [],
        }
        kind = query.get("type", "application/octet-stream")
        self.start_answer(request, 200, [("content-type", kind), *framings[framing]])
        if request.method == "HEAD":
            return
        for at in range(0, total, step):
            data = pseudo_random_bytes(at, min(step, total - at))
            connection.write(b"%x\r\n%b\r\n" % (len(data), data) if framing == "chunked" else data)
            await connection.writable.wait()
            await asyncio.sleep(interval)
        connection.write(b"0\r\n\r\n" if framing == "chunked" else b"")

    async def sink(self, request: Request) -> None:
        if (rate := float(request.query.get("rate", "inf"))) == 0:
            request.connection.transport.pause_reading()
            gone = select.poll()  # asyncio doesn't look at a connection that it doesn't read
            gone.register(request.connection.transport.get_extra_info("socket"), select.POLLRDHUP)
            while not gone.poll(0):  # noqa: ASYNC110 - there is nothing that would set an event
                await asyncio.sleep(0.02)
            request.connection.transport.abort()
        request.rate = 0 if rate == float("inf") else rate
        length, digest = await digest_body(request)
        self.respond(request, 200, {"body_len": length, "body_sha256": digest})

    async def hang(self, request: Request) -> None:
        await self.loop.create_future()

    async def status(self, request: Request) -> None:
        code = int(request.path.rpartition("/")[2])
        self.respond(request, code, {"status": code})

    async def state(self, request: Request) -> None:
        answer: JSON = {"pid": os.getpid(), "engine_pid": self.engine.pid, "worker_pid": self.engine.worker_pid}
        answer |= {"argv": self.argv, "starts": self.start, "connections_open": len(self.connections)}
        answer |= {"running": self.running_count, "finished": self.finished_count, "aborted": self.aborted_count}
        answer["scrapes"] = self.scrape_count
        answer["env_names"] = sorted(os.environ)
        answer["env"] = {name: value for name, value in os.environ.items() if name.startswith("FAKE_")}
        self.respond(request, 200, answer)


async def digest_body(request: Request) -> tuple[int, str]:
    digest, length = sha256(), 0
    async for piece in request.body:
        digest.update(piece)
        length += len(piece)
    return length, digest.hexdigest()


def pseudo_random_bytes(offset: int, length: int) -> bytes:
    """Returns a part of an endless, fixed series of bytes: block i of 32 bytes is SHA-256 of i modulo 4096."""
    first = offset // 32
    blocks = b"".join(sha256(b"%d" % (i % 4096)).digest() for i in range(first, (offset + length) // 32 + 1))
    return blocks[offset - first * 32 :][:length]


Handler = Callable[[Server, Request], Awaitable[None]]

# `how` -> what dies. Only `exit` takes the children along, as a Python program that ends by itself would.
DEATHS: dict[str, Callable[[Server, int], None]] = {
    "engine": lambda server, _: server.engine.kill(signal.SIGKILL),
    "api": lambda _, __: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda server, code: server.leave(code),
    "signal": lambda _, number: os.kill(os.getpid(), number),
}

ROUTES: dict[str, dict[str, Handler]] = {
    "/health": {"GET": Server.health},
    "/ping": {"GET": Server.health, "POST": Server.health},
    "/version": {"GET": Server.version},
    "/v1/models": {"GET": Server.models},
    "/metrics": {"GET": Server.metrics, "HEAD": Server.metrics},
    "/tokenize": {"POST": Server.tokenize},
    **{path: {"POST": Server.generate} for path in DIALECTS},
    "/v1/messages/count_tokens": {"POST": Server.count_tokens},
    "/v1/realtime": {"GET": Server.realtime},
    "/fake/echo": {"ANY": Server.echo},
    "/fake/raw": {"ANY": Server.raw},
    "/fake/bytes": {"ANY": Server.binary},
    "/fake/sink": {"ANY": Server.sink},
    "/fake/hang": {"ANY": Server.hang},
    "/fake/status": {"ANY": Server.status},
    "/fake/state": {"ANY": Server.state},
}


def run_headless(options: Options, plan: Plan) -> NoReturn:
    """Runs a rank above 0: waits for its worker, and exits with 0 whichever way that ended, once it had joined."""
    head = f"{options.ranks['master_addr']}:{options.ranks['master_port']}"
    wording = f"headless multiproc executor, with head node address {head} for torch.distributed process group."
    log(f"Launching vLLM (v{VERSION}) {wording}", "serve.py:1", "MainProcess")
    name = f"VLLM::Worker_TP{options.ranks['rank']}"
    worker = spawn(name, "--as-rank", json.dumps({**options.ranks, "load_seconds": plan.load_seconds}))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.kill(worker, signal.SIGKILL))
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    text = f"Worker proc VllmWorker-1 died unexpectedly (exit code: {code}), shutting down executor."
    log(text, "multiproc_executor.py:1", "MainProcess", "ERROR")
    time.sleep(plan.exit_delay_after_engine_death)
    os._exit(max(code, 0))


async def serve(options: Options, plan: Plan, start: int, argv: list[str]) -> None:
    await Server(options, plan, start, argv).run()


def main(argv: list[str]) -> None:
    if argv[1:2] != ["serve"]:
        usage_error("argument subparser: the only command here is serve")
    try:
        plan, start = read_plan()
    except (ValueError, OSError) as problem:
        usage_error(f"FAKE_VLLM_PLAN, FAKE_VLLM_COUNT or FAKE_VLLM_KEEPALIVE: {problem}")
    options = read_options(argv[2:], plan.reject_flags)
    if options.headless:
        run_headless(options, plan)
    log(f"vLLM API server version {VERSION} (fake), model {options.model}", "api_server.py:1")
    asyncio.run(serve(options, plan, start, argv))
