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


def length(text: str) -> int:
    """A number of tokens as vLLM reads it: 4096, 4k (thousands), 4K (of 1024), auto or -1."""
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
    if refused := [name for name in flags if name in reject]:
        usage_error(f"unrecognized arguments: {' '.join(refused)}")

    def one(name: str, default: str) -> str:
        if flags.get(name) == []:
            usage_error(f"argument {name}: expected one argument")
        return flags.get(name, [default])[-1]

    def number(name: str, default: int) -> int:
        if not re.fullmatch(r"-?\d+", text := one(name, str(default))):
            usage_error(f"argument {name}: invalid int value: '{text}'")
        return int(text)

    try:
        origins = json.loads(one("--allowed-origins", "[]"))
    except ValueError as problem:
        usage_error(f"argument --allowed-origins: {problem}")
    model = positionals[0] if positionals else one("--model", "Qwen/Qwen3-0.6B")
    return Options(
        model=model,
        names=flags.get("--served-model-name") or [model],
        uds=one("--uds", ""),
        host=one("--host", ""),
        port=number("--port", 8000),
        max_model_len=length(one("--max-model-len", "auto")),
        max_num_seqs=number("--max-num-seqs", 256),
        shutdown_timeout=number("--shutdown-timeout", 0),
        request_id_headers="--enable-request-id-headers" in flags,
        access_log="--disable-uvicorn-access-log" not in flags,
        log_stats="--disable-log-stats" not in flags,
        sse_keep_alive=number("--sse-keep-alive-interval", 0),
        root_path=one("--root-path", "").rstrip("/"),
        allowed_origins=origins,
        headless="--headless" in flags,
        ranks={
            "nnodes": number("--nnodes", 1),
            "rank": number("--node-rank", 0),
            "master_addr": one("--master-addr", "127.0.0.1"),
            "master_port": number("--master-port", 29501),
        },
    )


PER_REQUEST = {"per_request": True}


@dataclass(frozen=True)
class Plan:
    """How to misbehave: each key of a plan is a field here (manual: docs/development/fake_vllm.md). -1 means never."""

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

    def with_keys(self, keys: object, request: bool = False) -> Plan:
        """This plan with some keys replaced. Raises ValueError on a key unknown here or a value of the wrong type."""
        if not isinstance(keys, dict):
            raise ValueError("a plan is a JSON object")  # noqa: TRY004 - it is the user's text that is wrong
        allowed = {one.name for one in dataclasses.fields(self) if one.metadata or not request}
        for key, value in keys.items():
            kind = type(getattr(self, key)) if key in allowed else None
            if not kind or type(value) not in ((float, int) if kind is float else (kind,)):
                raise ValueError(f"unknown key, or not of type {kind.__name__}: {key}" if kind else f"unknown: {key}")
            if key == "how" and not re.fullmatch(r"engine|api|exit:\d+|signal:\d+", value):
                raise ValueError(f"how: engine, api, exit:CODE or signal:N, not {value!r}")
        return dataclasses.replace(self, **keys)


def read_plan() -> tuple[Plan, int]:
    """The plan for this start, and which start it is (counted in the file FAKE_VLLM_COUNT, from 1)."""
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
    return plan.with_keys(plans[min(start, len(plans)) - 1] if plans else {}), start


# -- HTTP/1.1 by hand


class Refusal(Exception):
    """Another answer than the wanted one; `body` is sent as JSON, or nothing if None."""

    def __init__(self, status: int, body: JSON | None, headers: Headers | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or []


def error(code: int, message: str, kind: str, param: str | None = None) -> JSON:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None) -> Refusal:
    return Refusal(400, error(400, message, "BadRequestError", param))


def size(text: str, base: int = 10) -> int:
    if not re.fullmatch(r"[0-9A-Fa-f]+", text.strip()):  # int() would take signs, underscores and 0x
        raise ValueError(f"not a length: {text!r}")
    return int(text, base)


class Request:
    """A parsed head; the body is read on demand."""

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
        self.old = self.version == "1.0"
        self.close = self.old or "close" in self.header("connection").lower()
        self.answered = False
        self.trailers: Headers = []
        self.rate = 0.0  # bytes per second at which the body is read; 0: no limit
        self.body = self.pieces()  # one generator, so that whoever comes later reads on where another stopped

    def header(self, name: str) -> str:
        return ", ".join(value for key, value in self.headers if key.lower() == name)

    async def pieces(self) -> AsyncIterator[bytes]:
        connection = self.connection
        chunked = "chunked" in self.header("transfer-encoding").lower()
        left = 0 if chunked else size(self.header("content-length") or "0")
        if "100-continue" in self.header("expect").lower() and not self.old:
            if self.answered:  # without a 100 nobody can tell whether the body will come
                raise Refusal(417, None)
            connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while chunked or left:
            if not left:
                left = size((await connection.line()).split(b";")[0].decode(), 16)
            if chunked and not left:
                break
            piece = await connection.take(min(left, int(self.rate / 20) + 1 if self.rate else 65536))
            left -= len(piece)
            if chunked and not left:
                await connection.line()
            yield piece
            if self.rate:
                await asyncio.sleep(len(piece) / self.rate)
        while chunked and (line := (await connection.line()).decode("latin-1")):
            name, _, value = line.partition(":")
            self.trailers.append((name, value.strip(" \t")))

    async def json(self) -> JSON:
        try:
            value = json.loads(b"".join([piece async for piece in self.body]))
        except ValueError as problem:
            raise bad_request(f"The body is not valid JSON: {problem}") from None
        if not isinstance(value, dict):
            raise bad_request("The body must be a JSON object")
        return value


class Connection(asyncio.Protocol):
    """One client. Requests are served in turn; the client's going away cancels whatever is being done for it."""

    HIGH_WATER = 65536
    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server, self.loop = server, asyncio.get_running_loop()
        self.buffer = bytearray()
        self.arrived: asyncio.Future[None] | None = None
        self.idle: asyncio.TimerHandle | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self.busy, self.requests = False, 0
        self.stream: Stream | None = None

    # called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.connections_seen += 1
        self.serial = self.server.connections_seen
        self.server.connections.add(self)
        self.task = self.loop.create_task(self.serve())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) > self.HIGH_WATER:
            self.transport.pause_reading()
        if self.idle:
            self.idle.cancel()
        if self.arrived and not self.arrived.done():
            self.arrived.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self.writable.set()  # nobody shall wait for a client that has gone
        self.task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()
        if self.stream:
            self.stream.write()

    # called by handlers

    async def more(self) -> None:
        self.transport.resume_reading()
        self.arrived = self.loop.create_future()
        await self.arrived

    async def take(self, most: int) -> bytes:
        while not self.buffer:
            await self.more()
        piece = bytes(self.buffer[:most])
        del self.buffer[:most]
        return piece

    async def line(self, end: bytes = b"\r\n") -> bytes:
        while (at := self.buffer.find(end)) < 0:
            if len(self.buffer) > self.HIGH_WATER:
                raise Refusal(431, None)
            await self.more()
        line = bytes(self.buffer[:at])
        del self.buffer[: at + len(end)]
        return line

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    async def write_apart(self, *parts: bytes) -> None:
        """Write so that no read of the client sees two parts in one: wait (at most 20 ms) until it has taken each."""
        fd = self.transport.get_extra_info("socket").fileno()
        for part in parts:
            self.write(part)
            await self.writable.wait()
            for _ in range(20):
                await asyncio.sleep(0.001)
                if self.transport.is_closing() or not any(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4))):
                    break

    async def serve(self) -> None:
        request, keep = None, True
        try:
            while keep and not self.server.draining:
                head, request = b"", None
                while not head.strip():
                    head = await self.line(b"\r\n\r\n")
                self.busy = True
                self.requests += 1
                request = Request(self, head.lstrip())
                if keep := await self.server.handle(request):
                    async for _ in request.body:
                        pass
                self.busy = False
                if not self.buffer:
                    self.idle = self.loop.call_later(self.server.plan.keepalive, self.transport.close)
        except (Refusal, ValueError) as problem:  # not HTTP, or a body that nobody can tell the end of
            if not request or not request.answered:
                self.head(problem.status if isinstance(problem, Refusal) else 400, [("connection", "close")])
        except asyncio.CancelledError:  # the client has gone
            pass
        finally:
            self.transport.close()

    def head(self, status: int, headers: Headers, request: Request | None = None) -> None:
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        lines = [f"HTTP/1.1 {status} {phrase}", f"date: {date}", "server: uvicorn"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if request:
            request.answered = True
            if self.server.options.access_log:
                what = f"{request.method} {request.target} HTTP/{request.version}"
                self.server.log_uvicorn(f'{self.serial} - "{what}" {status} {phrase}', fd=1)


# -- /metrics

# What is there whatever the options: of prometheus_client and of the HTTP server. They tell nothing of the engine.
OTHER_METRICS = """\
# HELP python_info Python platform information
# TYPE python_info gauge
python_info{{implementation="CPython",major="3",minor="11",patchlevel="7",version="3.11.7"}} 1.0
# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total {seconds}
# HELP http_requests_total Total number of requests by method, status and handler.
# TYPE http_requests_total counter
"""


def label(value: str) -> str:
    """As prometheus_client writes the value of a label."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# -- answers: words, and the shapes that the APIs wrap around them

# Every second word has a character of several bytes, so that any two tokens have one to cut through.
WORDS = ["the ", "naïve ", "model ", "日本 ", "says ", "🙂 ", "and ", "Füße ", "token ", "Ωmega ", 'a "quote" ', "é\n"]
ESCAPED = [json.dumps(word, ensure_ascii=False)[1:-1].encode() for word in WORDS]
MARK = "@word@"
NUMBER, QUOTED_NUMBER = b"@number@", b'"@number@"'
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEPT_ALIVE = ("/v1/chat/completions", "/v1/completions")  # vLLM's other streams have no comments
MAX_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def texts(value: object) -> str:
    """All the text inside a prompt, a list of messages, or a list of parts."""
    if isinstance(value, list):
        return " ".join(texts(item) for item in value)
    if isinstance(value, dict):
        return texts([value[key] for key in ("content", "text") if key in value])
    return "" if value is None else str(value)


def sse(data: JSON, event: str = "") -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


def named(kind: str, **data: object) -> bytes:
    return sse({"type": kind, **data}, kind)


def counted(kind: str, **data: object) -> bytes:
    """An event of /v1/responses. Each has its number in the stream, which is put in when it goes out."""
    return named(kind, **data, sequence_number=NUMBER.decode()).replace(QUOTED_NUMBER, NUMBER)


@dataclass
class Asked:
    """What an answer is made from."""

    body: JSON
    ident: str
    model: str
    prompt: str
    prompt_tokens: int
    count: int

    def __post_init__(self) -> None:
        self.seed = binascii.crc32(self.prompt.encode())
        self.text = "".join(WORDS[(self.seed + i) % len(WORDS)] for i in range(self.count))
        self.cut_off = any(name in self.body for name in MAX_TOKENS)
        self.created = int(time.time())


@dataclass
class Answer:
    """One answer in one dialect; all of it but the timing is known beforehand."""

    whole: JSON
    opening: bytes
    word: bytes  # an event with MARK where a word goes
    closing: bytes
    dead: bytes  # how a stream ends when the engine is gone
    greeting: bytes = b""  # events that the API server sends with the head, before the engine has done anything


def openai_answer(asked: Asked, kind: str, chunk_kind: str, contents: list[JSON]) -> Answer:
    """`contents`: what choice 0 holds in the whole answer, in a word's event, in the last event, in the first event."""
    reason = "length" if asked.cut_off else "stop"
    usage: JSON = {"prompt_tokens": asked.prompt_tokens, "completion_tokens": asked.count}
    usage["total_tokens"] = asked.prompt_tokens + asked.count

    def of(kind: str, content: JSON | None, reason: str | None, **more: object) -> JSON:
        choice = {"index": 0, **(content or {}), "logprobs": None, "finish_reason": reason}
        base = {"id": asked.ident, "object": kind, "created": asked.created, "model": asked.model}
        return {**base, "choices": [] if content is None else [choice], **more}

    wants_usage = (asked.body.get("stream_options") or {}).get("include_usage")
    return Answer(
        whole=of(kind, contents[0], reason, usage=usage),
        opening=b"".join(sse(of(chunk_kind, content, None)) for content in contents[3:]),
        word=sse(of(chunk_kind, contents[1], None)),
        closing=sse(of(chunk_kind, contents[2], reason))
        + (sse(of(chunk_kind, None, None, usage=usage)) if wants_usage else b"")
        + DONE,
        dead=sse(error(500, ENGINE_DEAD, "InternalServerError")) + DONE,
    )


def chat(asked: Asked) -> Answer:
    whole = {"message": {"role": "assistant", "content": asked.text, "tool_calls": []}}
    deltas = [{"delta": {"content": MARK}}, {"delta": {"content": ""}}, {"delta": {"role": "assistant", "content": ""}}]
    return openai_answer(asked, "chat.completion", "chat.completion.chunk", [whole, *deltas])


def completion(asked: Asked) -> Answer:
    return openai_answer(
        asked, "text_completion", "text_completion", [{"text": asked.text}, {"text": MARK}, {"text": ""}]
    )


def anthropic(asked: Asked) -> Answer:
    end = {"stop_reason": "max_tokens" if asked.cut_off else "end_turn", "stop_sequence": None}
    usage = {"input_tokens": asked.prompt_tokens, "output_tokens": asked.count}
    message = {"id": asked.ident, "type": "message", "role": "assistant", "model": asked.model}
    empty: JSON = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 0}}
    return Answer(
        whole={**message, "content": [{"type": "text", "text": asked.text}], **end, "usage": usage},
        opening=named("message_start", message=empty)
        + named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        word=named("content_block_delta", index=0, delta={"type": "text_delta", "text": MARK}),
        closing=named("content_block_stop", index=0)
        + named("message_delta", delta=end, usage=usage)
        + named("message_stop"),
        dead=named("error", error={"type": "internal_error", "message": ENGINE_DEAD}) + named("message_stop"),
    )


def responses(asked: Asked) -> Answer:
    place: JSON = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": asked.text, "annotations": [], "logprobs": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    whole = {"id": asked.ident, "object": "response", "created_at": asked.created, "model": asked.model}
    whole |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None}
    begun: JSON = {**whole, "status": "in_progress", "output": []}
    usage: JSON = {"input_tokens": asked.prompt_tokens, "input_tokens_details": {"cached_tokens": 0}}
    usage |= {"output_tokens": asked.count, "output_tokens_details": {"reasoning_tokens": 0}}
    usage["total_tokens"] = asked.prompt_tokens + asked.count
    whole |= {"status": "completed", "output": [item], "usage": usage}
    no_item, no_part = {**item, "status": "in_progress", "content": []}, {**part, "text": ""}
    return Answer(
        whole=whole,
        greeting=counted("response.created", response=begun) + counted("response.in_progress", response=begun),
        opening=counted("response.output_item.added", output_index=0, item=no_item)
        + counted("response.content_part.added", **place, part=no_part),
        word=counted("response.output_text.delta", **place, logprobs=[], delta=MARK),
        closing=counted("response.output_text.done", **place, logprobs=[], text=asked.text)
        + counted("response.content_part.done", **place, part=part)
        + counted("response.output_item.done", output_index=0, item=item)
        + counted("response.completed", response=whole),
        dead=counted("error", code="500", message=ENGINE_DEAD, param=None),
    )


# path -> (shape, prefix of its ids, field of the prompt)
DIALECTS: dict[str, tuple[Callable[[Asked], Answer], str, str]] = {
    "/v1/chat/completions": (chat, "chatcmpl-", "messages"),
    "/v1/completions": (completion, "cmpl-", "prompt"),
    "/v1/messages": (anthropic, "chatcmpl-", "messages"),
    "/v1/responses": (responses, "resp_", "input"),
}


# -- the API server's side of the engine


class Stream:
    """A generation under way. If it is not to be streamed, the words are only counted. The engine does not wait for a
    client that does not read: what it has made is sent when there is room."""

    def __init__(self, server: Server, request: Request, asked: Asked, answer: Answer) -> None:
        self.server, self.asked, self.answer = server, asked, answer
        self.connection, self.chunked = request.connection, not request.old
        self.ident, self.streamed = server.requests, bool(asked.body.get("stream"))
        self.faults = server.faults(request)
        self.prefix, _, self.suffix = answer.word.partition(MARK.encode())
        self.made = self.sent = 0
        self.wrote_at = server.loop.time()
        self.to_read = max(0, self.faults.prefill_steps)  # steps of the prefill
        self.pace = self.faults.prefill_seconds / (self.to_read + 1)
        self.due = self.wrote_at + self.pace
        self.events = 0  # that were counted
        self.cutting: asyncio.Task[None] | None = None
        self.done: asyncio.Future[bool] = server.loop.create_future()  # True: all words are out; False: no engine

    def runnable(self) -> bool:
        return not self.cutting and not self.done.done()

    def framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data

    def numbered(self, data: bytes) -> bytes:
        while NUMBER in data:
            data = data.replace(NUMBER, b"%d" % self.events, 1)
            self.events += 1
        return data

    def step(self, now: float) -> None:
        """The engine has read a piece of the prompt, or made one more token."""
        if self.to_read:
            self.to_read -= 1
            self.due = max(self.due + self.pace, now)
            return
        self.made += 1
        self.due = max(self.due + self.faults.token_interval, now)
        self.write()

    def write(self) -> None:
        """Sends what has been made, as far as the client takes it."""
        while self.sent < self.made and not self.cutting and (self.connection.writable.is_set() or not self.streamed):
            word = ESCAPED[(self.asked.seed + self.sent) % len(ESCAPED)]
            self.sent += 1
            self.wrote_at = self.server.loop.time()
            if not self.streamed:
                self.written()
                continue
            if self.sent == 1 and self.answer.opening:
                self.connection.write(self.framed(self.numbered(self.answer.opening)))
            data = self.prefix + word + (b"\xff\xfe" if self.faults.binary else b"") + self.numbered(self.suffix)
            if self.faults.split_utf8 and (wide := re.search(rb"[\xc0-\xff]", word)):
                self.cutting = self.server.loop.create_task(self.write_cut(data, len(self.prefix) + wide.end()))
            else:
                self.connection.write(self.framed(data))
                self.written()

    async def write_cut(self, data: bytes, at: int) -> None:
        await self.connection.write_apart(self.framed(data[:at]), self.framed(data[at:]))
        self.cutting = None
        self.written()
        self.write()
        self.server.engine.step()

    async def keep_alive(self, interval: float) -> None:
        """Comments for a client that has heard nothing for so long. They come from the API server alone, and so tell
        nothing of the engine."""
        while True:
            await asyncio.sleep(self.wrote_at + interval - self.server.loop.time())
            await self.connection.writable.wait()
            if self.cutting:
                await self.cutting
            if (now := self.server.loop.time()) >= self.wrote_at + interval:
                self.wrote_at = now
                self.connection.write(self.framed(KEEP_ALIVE))

    def written(self) -> None:
        self.server.tokens_written += 1
        for plan, count in ((self.faults, self.sent), (self.server.plan, self.server.tokens_written)):
            if plan.die_after_tokens == count and plan.how != "engine":
                self.server.die(plan.how)
        if self.sent >= self.asked.count and not self.done.done():
            self.done.set_result(True)


class Engine:
    """Asks the engine process for tokens: one message for all streams that are due, and never two under way."""

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
        self.dead = False
        self.counters = [0, 0, 0, 0, 0, 0]
        self.streams: dict[int, Stream] = {}
        self.added: list[list[int]] = []
        self.dropped: list[int] = []
        self.asked: list[Stream] | None = None  # None: nothing under way
        self.timer: asyncio.TimerHandle | None = None
        server.loop.add_reader(self.channel, self.on_reply)

    def add(self, stream: Stream) -> None:
        self.streams[stream.ident] = stream
        die = stream.faults.die_after_tokens if stream.faults.how == "engine" else -1
        self.added.append([stream.ident, stream.asked.prompt_tokens, die, stream.faults.freeze_after_tokens])
        if self.dead:
            stream.done.set_result(False)
        self.step()

    def forget(self, stream: Stream) -> None:
        if self.streams.pop(stream.ident, None):
            self.dropped.append(stream.ident)

    def drop(self, stream: Stream) -> None:
        self.forget(stream)
        self.step()

    def step(self) -> None:
        """Send what has changed and which streams are due, unless a reply is awaited."""
        if self.asked is not None or self.dead:
            return
        if self.timer:
            self.timer.cancel()
        now, soonest, due = self.server.loop.time(), float("inf"), list[Stream]()
        for stream in islice(self.streams.values(), self.server.options.max_num_seqs):
            if stream.due > now + 0.001:
                soonest = min(soonest, stream.due)
            elif stream.runnable():
                due.append(stream)
        if due or self.added or self.dropped:
            order = {"add": self.added, "drop": self.dropped}
            order |= {"read": [stream.ident for stream in due if stream.to_read]}
            order |= {"step": [stream.ident for stream in due if not stream.to_read]}
            self.asked, self.added, self.dropped = due, [], []
            with contextlib.suppress(OSError):  # it has just died: on_reply will learn of it
                self.channel.send(json.dumps(order).encode())
        elif soonest < float("inf"):
            self.timer = self.server.loop.call_at(soonest, self.step)

    def on_reply(self) -> None:
        try:
            reply = self.channel.recv(MESSAGE_LIMIT)
        except OSError:
            reply = b""
        if not reply:
            self.on_death()
        elif not self.worker_pid:
            self.worker_pid = int(reply)
            self.ready.set_result(True)
        else:
            self.counters = json.loads(reply)
            asked, self.asked = self.asked or [], None
            now = self.server.loop.time()
            for stream in asked:
                if stream.ident in self.streams:
                    stream.step(now)
                    if stream.made == stream.asked.count:
                        self.forget(stream)
            self.step()

    def on_death(self) -> None:
        """Every stream ends now, and the API server soon after, with code 0."""
        loop = self.server.loop
        self.dead = True
        loop.remove_reader(self.channel)
        if not self.ready.done():
            self.ready.set_result(False)
        log("AsyncLLM output_handler failed: EngineCore died unexpectedly.", "async_llm.py:1", level="ERROR")
        self.fail_all()
        loop.call_later(0.05, self.reap)
        loop.call_later(self.server.plan.exit_delay_after_engine_death, os._exit, 0)

    def fail_all(self) -> None:
        for stream in self.streams.values():
            if not stream.done.done():
                stream.done.set_result(False)

    def reap(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self.pid, os.WNOHANG) != (0, 0)
        return True

    def kill(self, number: int) -> None:
        if not self.dead:  # else its pid may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self) -> None:
        """Terminate the engine and, through it, the worker; kill both if that takes longer than half a second."""
        self.kill(signal.SIGTERM)
        for _ in range(100):
            if self.dead or self.reap():
                return
            time.sleep(0.005)
        self.kill(signal.SIGKILL)
        if self.worker_pid:
            os.kill(self.worker_pid, signal.SIGKILL)


# -- its life and its routes

KV_BLOCKS = 10_000
WEBSOCKET = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
UNCOUNTED = ("/metrics", "/health", "/ping", "/version")  # by vLLM's own http_requests_total


class Server:
    """The process that was started: its life, its routes."""

    def __init__(self, options: Options, plan: Plan, start: int, argv: list[str]) -> None:
        self.options, self.plan, self.start, self.argv = options, plan, start, argv
        # Counted limits are each request's own: it inherits none of the plan's.
        self.request_plan = dataclasses.replace(plan, die_after_tokens=-1, freeze_after_tokens=-1, how="engine")
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.connections_seen = self.requests = self.tokens_written = 0
        self.running = self.finished = self.aborted = self.scrapes = 0
        self.answers: Counter[tuple[str, str, int]] = Counter()  # route, method, status
        self.draining = False
        self.tasks: list[asyncio.Task[None]] = []
        for number in (signal.SIGTERM, signal.SIGINT):  # before the engine is told to begin: it must not outlive these
            self.loop.add_signal_handler(number, self.on_signal)
        self.listener = self.bind()
        self.segment = Segment(plan.shm)
        self.engine = Engine(self)

    def log_uvicorn(self, text: str, fd: int = 2) -> None:
        write_log(f"(APIServer pid={os.getpid()}) INFO:     {text}\n".encode(), fd)

    def bind(self) -> socket.socket:
        """As vLLM: bound before loading, listening only after it; a stale socket file is an error."""
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
        self.tasks.append(self.loop.create_task(self.be_noisy()))
        if last := self.plan.die_at_start:
            write_log("".join(f"{line}\n" for line in last.get("log", [])).encode(), 2)
            await asyncio.sleep(last.get("after", 0))
            self.die(f"signal:{last['signal']}" if "signal" in last else f"exit:{last.get('code', 1)}")
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

    async def be_noisy(self) -> None:
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
        """A clean exit: no child, no segment; only the socket file stays, as with vLLM."""
        self.engine.stop()
        self.segment.remove()
        os._exit(code)

    def on_signal(self) -> None:
        if self.plan.ignore_sigterm:
            log("A signal was ignored, as planned", "launcher.py:1", level="WARNING")
        elif not self.draining:
            self.draining = True
            self.tasks.append(self.loop.create_task(self.shut_down()))

    async def shut_down(self) -> None:
        timeout = self.options.shutdown_timeout
        mode = "drain" if timeout else "abort"
        log(f"[shutdown] API server: stopping engine client mode={mode} timeout={timeout}s", "launcher.py:2")
        self.loop.remove_reader(self.listener)
        self.listener.close()
        for patience in (timeout, 0.3):
            deadline = self.loop.time() + patience
            while self.loop.time() < deadline and self.unfinished():  # noqa: ASYNC110 - kernel buffers set no event
                await asyncio.sleep(0.005)
            self.engine.fail_all()
        self.log_uvicorn("Application shutdown complete.")
        self.leave(0)

    def unfinished(self) -> bool:
        return any(one.busy or one.transport.get_write_buffer_size() for one in self.connections)

    # -- requests

    def faults(self, request: Request) -> Plan:
        text = request.header("x-fake")
        try:
            return self.request_plan.with_keys(json.loads(text), request=True) if text else self.request_plan
        except ValueError as problem:
            raise bad_request(f"X-Fake: {problem}") from None

    async def handle(self, request: Request) -> bool:
        """Answer one request; False: the connection can't be used again."""
        root = self.options.root_path
        if root and request.path.startswith(root + "/"):
            request.path = request.path[len(root) :]
        try:
            faults = self.faults(request)
            request.close |= faults.close_connection_after_response
            await self.route(request)(self, request)
        except Refusal as refusal:
            self.respond(request, refusal.status, refusal.body, refusal.headers)
        except (ValueError, LookupError, TypeError, AttributeError) as problem:  # JSON of an unexpected shape
            if request.answered:
                return False
            request.close = True
            self.respond(request, 400, error(400, repr(problem), "BadRequestError"))
        else:
            return not request.close and not faults.close_silently
        return not request.close

    def route(self, request: Request) -> Handler:
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
        if path not in UNCOUNTED:
            self.answers[path if path in ROUTES else "none", request.method, status] += 1
        if self.options.request_id_headers and (ident := request.header("x-request-id")):
            headers = [*headers, ("x-request-id", ident)]
        if (origin := request.header("origin")) and (allowed := self.options.allowed_origins):
            named = "*" if "*" in allowed else origin if origin in allowed else ""
            headers = [*headers, *([("access-control-allow-origin", named)] if named else []), ("vary", "Origin")]
        request.connection.head(status, [*headers, *([("connection", "close")] if request.close else [])], request)

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
        self.respond(request, 503 if self.engine.dead else 200)

    async def version(self, request: Request) -> None:
        self.respond(request, 200, {"version": VERSION})

    async def models(self, request: Request) -> None:
        card = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "root": self.options.model}
        card |= {"parent": None, "max_model_len": self.options.max_model_len, "permission": []}
        self.respond(request, 200, {"object": "list", "data": [{"id": name, **card} for name in self.options.names]})

    async def metrics(self, request: Request) -> None:
        self.scrapes += 1  # whoever asked may be gone before it is answered
        if delays := self.plan.metrics_delays:
            await asyncio.sleep(delays[(self.scrapes - 1) % len(delays)])
        steps, tokens, prompt, running, waiting, blocks = self.engine.counters
        samples = [
            ("num_requests_running", "gauge", "", "", running),
            ("num_requests_waiting", "gauge", "", "", waiting),
            ("kv_cache_usage_perc", "gauge", "", "", blocks / KV_BLOCKS),
            ("prompt_tokens", "counter", "_total", "", prompt),
            ("generation_tokens", "counter", "_total", "", tokens),
            ("request_success", "counter", "_total", ',finished_reason="length"', self.finished),
            ("iteration_tokens_total", "histogram", "_bucket", ',le="+Inf"', steps),
            ("iteration_tokens_total", "", "_count", "", steps),
            ("iteration_tokens_total", "", "_sum", "", tokens + prompt),
        ]
        text, model = OTHER_METRICS.format(seconds=time.process_time()), label(self.options.names[0])
        for (route, method, status), count in self.answers.items():
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
        body = await request.json()
        self.model_of(body)
        words = texts(body.get("prompt", body.get("messages"))).split()
        tokens = [binascii.crc32(word.encode()) % 32000 for word in words]
        answer = {"count": len(tokens), "max_model_len": self.options.max_model_len, "tokens": tokens}
        self.respond(request, 200, {**answer, "token_strs": None})

    async def count_tokens(self, request: Request) -> None:
        """Of Anthropic's API."""
        body = await request.json()
        self.model_of(body)
        if body.get("messages") is None:
            raise bad_request("Field required: messages", "messages")
        words = f"{texts(body.get('system'))} {texts(body['messages'])}".split()
        self.respond(request, 200, {"input_tokens": max(1, len(words))})

    def understand(self, request: Request, body: JSON) -> tuple[Asked, Answer]:
        shape, prefix, source = DIALECTS[unquote(request.path)]
        model, prompt = self.model_of(body), texts(body.get(source))
        if body.get(source) is None:
            raise bad_request(f"Field required: {source}", source)
        count = next((body[name] for name in MAX_TOKENS if body.get(name) is not None), 16)
        if type(count) is not int or count < 1:
            raise bad_request(f"max_tokens must be at least 1, got {count!r}.", "max_tokens")
        prompt_tokens, limit = max(1, len(prompt.split())), self.options.max_model_len
        if prompt_tokens + count > limit:
            message = (
                f"This model's maximum context length is {limit} tokens, but {prompt_tokens} + {count} were asked."
            )
            raise bad_request(message, "input_tokens")
        ident = prefix + (request.header("x-request-id") or os.urandom(12).hex())
        asked = Asked(body, ident, model, prompt, prompt_tokens, count)
        return asked, shape(asked)

    async def generate(self, request: Request) -> None:
        body, connection = await request.json(), request.connection
        asked, answer = self.understand(request, body)
        if self.draining:
            raise Refusal(503, error(503, "The server is shutting down.", "ServiceUnavailableError"))
        self.requests += 1
        stream = Stream(self, request, asked, answer)
        for plan in (self.plan, stream.faults):  # what strikes before the first token
            if plan.die_after_tokens == 0 or 0 <= plan.die_after_requests < self.requests:
                self.die(plan.how)
            if plan.freeze_after_tokens == 0:
                self.engine.kill(signal.SIGSTOP)
        self.running += 1
        connection.stream = stream
        keeping_alive: asyncio.Task[None] | None = None
        try:
            if stream.streamed:
                framing = [("transfer-encoding", "chunked")] if stream.chunked else []
                self.start_answer(request, 200, [("content-type", "text/event-stream; charset=utf-8"), *framing])
                if answer.greeting:
                    connection.write(stream.framed(stream.numbered(answer.greeting)))
                if (seconds := self.options.sse_keep_alive) and unquote(request.path) in KEPT_ALIVE:
                    keeping_alive = self.loop.create_task(stream.keep_alive(seconds))
            self.engine.add(stream)
            complete = await stream.done
            if stream.cutting:
                await stream.cutting
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1
            connection.stream = None
            if keeping_alive:
                keeping_alive.cancel()
            self.engine.drop(stream)
        self.finished += complete
        if stream.streamed:
            connection.write(stream.framed(stream.numbered(answer.closing if complete else answer.dead)))
            connection.write(b"0\r\n\r\n" if stream.chunked else b"")
        elif complete:
            self.respond(request, 200, answer.whole)
        else:
            self.respond(request, 500, error(500, ENGINE_DEAD, "InternalServerError"))
        await connection.writable.wait()

    async def realtime(self, request: Request) -> None:
        """A WebSocket on which nothing is said. A frame that closes it is answered."""
        if "websocket" not in request.header("upgrade").lower():
            raise Refusal(404, {"detail": "Not Found"})
        digest = sha1((request.header("sec-websocket-key") + WEBSOCKET).encode()).digest()
        switched = [("upgrade", "websocket"), ("connection", "Upgrade")]
        self.start_answer(request, 101, [*switched, ("sec-websocket-accept", base64.b64encode(digest).decode())])
        while (await request.connection.take(65536))[0] != 0x88:
            pass
        request.connection.write(b"\x88\x00")
        request.close = True

    # -- test routes: raw behaviours

    async def echo(self, request: Request) -> None:
        length, digest = await digest_of(request)
        answer: JSON = {"method": request.method, "target": request.target, "version": request.version}
        answer |= {"headers": request.headers, "trailers": request.trailers, "body_len": length, "body_sha256": digest}
        answer |= {"connection": request.connection.serial, "request": request.connection.requests}
        self.respond(request, 200, answer, [("X-Fake-Connection", str(request.connection.serial))])

    async def raw(self, request: Request) -> None:
        connection, query = request.connection, request.query
        if "raw" in query:  # the script in the query, so that any method and any body will do
            script: JSON = json.loads(base64.urlsafe_b64decode(query["raw"] + "=="))
            left = 0 if "no-read-body" in query else script.get("after", float("inf"))
            while left > 0 and (piece := await anext(request.body, b"")):
                left -= len(piece)
        elif "no-read-body" in query:
            script = {"parts": [{"b64": base64.b64encode(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly")}]}
        else:
            script = await request.json()
        request.answered = True
        for part in script.get("parts", []):
            await asyncio.sleep(part.get("delay", 0))
            await connection.write_apart(base64.b64decode(part["b64"]))
        while script.get("echo"):  # say, after a 101: every byte comes back
            connection.write(await connection.take(65536))
        if script.get("close") == "reset":
            connection.transport.abort()
        request.close = bool(script.get("close"))

    async def binary(self, request: Request) -> None:
        query, connection = request.query, request.connection
        total, framing = int(query.get("n", 1024)), query.get("framing", "length")
        step, interval = int(query.get("chunk", 65536)), float(query.get("interval", 0))
        request.close |= framing == "close"
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
            data = pseudo_random(at, min(step, total - at))
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
        length, digest = await digest_of(request)
        self.respond(request, 200, {"body_len": length, "body_sha256": digest})

    async def hang(self, request: Request) -> None:
        await self.loop.create_future()

    async def status(self, request: Request) -> None:
        code = int(request.path.rpartition("/")[2])
        self.respond(request, code, {"status": code})

    async def state(self, request: Request) -> None:
        answer: JSON = {"pid": os.getpid(), "engine_pid": self.engine.pid, "worker_pid": self.engine.worker_pid}
        answer |= {"argv": self.argv, "starts": self.start, "connections_open": len(self.connections)}
        answer |= {"running": self.running, "finished": self.finished, "aborted": self.aborted}
        answer["scrapes"] = self.scrapes
        answer["env_names"] = sorted(os.environ)
        answer["env"] = {name: value for name, value in os.environ.items() if name.startswith("FAKE_")}
        self.respond(request, 200, answer)


async def digest_of(request: Request) -> tuple[int, str]:
    digest, length = sha256(), 0
    async for piece in request.body:
        digest.update(piece)
        length += len(piece)
    return length, digest.hexdigest()


def pseudo_random(at: int, length: int) -> bytes:
    """A part of an endless series of bytes, always the same: block i of 32 bytes is SHA-256 of i modulo 4096."""
    first = at // 32
    blocks = b"".join(sha256(b"%d" % (i % 4096)).digest() for i in range(first, (at + length) // 32 + 1))
    return blocks[at - first * 32 :][:length]


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


def follow(options: Options, plan: Plan) -> NoReturn:
    """A rank above 0: a process that waits for its worker, and leaves with 0 whichever way that ended, once joined."""
    head = f"{options.ranks['master_addr']}:{options.ranks['master_port']}"
    what = f"headless multiproc executor, with head node address {head} for torch.distributed process group."
    log(f"Launching vLLM (v{VERSION}) {what}", "serve.py:1", "MainProcess")
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
        follow(options, plan)
    log(f"vLLM API server version {VERSION} (fake), model {options.model}", "api_server.py:1")
    asyncio.run(serve(options, plan, start, argv))
