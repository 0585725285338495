#!/usr/bin/env python3
"""A server that costs next to nothing, to stand for vLLM where the price of what lies in front of it is measured.

    scripts/fast_upstream.py serve MODEL --uds PATH [--port N]      as the supervisor starts it, and on a TCP port too

Every request with a body is answered at once with 260 bytes of JSON; one whose body holds `"stream"` with 64 SSE events
of 200 bytes, 2 ms apart (`--events`, `--interval`), or, where it says `"long"`, with 100,000 as fast as they are taken.
Requests are told apart by their heads alone, nothing is parsed.
It does without HTTP's corners: it is for load generators and proxies that are known to behave.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import uvloop

VERSION = "0.32.0"
LONG = 100_000
JSON = b'{"id": "chatcmpl-1", "object": "chat.completion", "choices": [{"message": {"content": "%s"}}]}' % (b"x" * 166)
JSON_RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(JSON), JSON)
EMPTY_RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


EVENT = chunk(b'data: {"id": "chatcmpl-1", "choices": [{"delta": {"content": "%b"}}]}\n\n' % (b"y" * 134))
END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Connection(asyncio.Protocol):
    events = 64
    interval = 0.002

    def __init__(self) -> None:
        self.buffer = b""
        self.is_paused = False
        self.remaining = 0
        self.pause = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.loop = asyncio.get_running_loop()

    def connection_lost(self, exc: Exception | None) -> None:
        self.remaining = -1

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            length = 0
            if (at := head.find(b"\r\ncontent-length:")) >= 0:
                length = int(head[at + 17 :].split(b"\r\n", 1)[0])
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            if not body:
                self.transport.write(EMPTY_RESPONSE)
            elif b'"stream"' in body:
                self.remaining, self.pause = (LONG, 0.0) if b'"long"' in body else (self.events, self.interval)
                self.transport.write(STREAM_HEAD)
                self.write_event()
            else:
                self.transport.write(JSON_RESPONSE)

    def write_event(self) -> None:
        if self.remaining < 0:
            return
        if self.is_paused:
            self.loop.call_later(0.01, self.write_event)
            return
        if self.remaining == 0:
            self.transport.write(END)
            return
        self.remaining -= 1
        self.transport.write(EVENT)
        if self.pause:
            self.loop.call_later(self.pause, self.write_event)
        else:
            self.loop.call_soon(self.write_event)


async def serve(uds: str | None, port: int | None) -> None:
    loop = asyncio.get_running_loop()
    servers = []  # without a reference the collector would close them
    if uds:
        Path(uds).unlink(missing_ok=True)  # noqa: ASYNC240  # nothing runs yet
        servers.append(await loop.create_unix_server(Connection, uds, backlog=2048))
    if port:
        servers.append(await loop.create_server(Connection, "127.0.0.1", port, backlog=2048))
    await asyncio.Event().wait()


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(VERSION)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("serve")
    parser.add_argument("model")
    parser.add_argument("--uds")
    parser.add_argument("--port", type=int)
    parser.add_argument("--events", type=int, default=64)
    parser.add_argument("--interval", type=float, default=0.002)
    arguments, _ = parser.parse_known_args()
    Connection.events, Connection.interval = arguments.events, arguments.interval
    uvloop.run(serve(arguments.uds, arguments.port))


if __name__ == "__main__":
    main()
