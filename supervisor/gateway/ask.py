"""Asks vLLM one small question of our own, over a connection of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httptools

if TYPE_CHECKING:
    from supervisor.gateway.upstream import Upstream


async def ask(upstream: Upstream, path: str, body: bytes = b"", *, patience: float) -> tuple[int, bytes] | None:
    """Returns the answer's status and body; None where there is none within `patience` seconds. It sends a POST where
    there is a `body`, which is JSON."""
    more = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: vllm\r\nConnection: close\r\n{more}\r\n"
    answer = _Answer()
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_unix_connection(upstream.path)
            try:
                writer.write(head.encode() + body)
                while not answer.complete and (data := await reader.read(64 * 1024)):
                    answer.parser.feed_data(data)
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError, httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    return (answer.parser.get_status_code(), b"".join(answer.parts)) if answer.complete else None


class _Answer:
    """Gathers one answer: httptools calls its methods."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.parts: list[bytes] = []
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_message_complete(self) -> None:
        self.complete = self.parser.get_status_code() >= 200  # else it was an interim one
