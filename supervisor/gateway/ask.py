"""One small question of our own to vLLM."""

from __future__ import annotations

import asyncio

from supervisor.gateway.errors import UpstreamError
from supervisor.gateway.http1 import Dechunker, Framing, KnownAnswer, ResponseHead
from supervisor.gateway.upstream import Sink, Upstream, UpstreamConnection


async def ask(upstream: Upstream, path: str, body: bytes = b"", *, patience: float) -> tuple[int, bytes] | None:
    """The answer's status and body, None where there is none within `patience` seconds; a POST where there is a body,
    which is JSON."""
    question = _Question(path, body, upstream.loop.create_future())
    upstream.send(question, fresh=True)
    try:
        async with asyncio.timeout(patience):
            return await question.answer
    except (UpstreamError, TimeoutError):
        return None
    finally:
        if question.connection is not None:
            question.connection.abort()


class _Question(Sink):
    """The sink of `ask`."""

    def __init__(self, path: str, body: bytes, answer: asyncio.Future[tuple[int, bytes]]) -> None:
        self.path = path
        self.body = body
        self.answer = answer
        self.connection: UpstreamConnection | None = None
        self.status = 0
        self.parts: list[bytes] = []
        self.dechunker: Dechunker | None = None

    def connected(self, connection: UpstreamConnection) -> None:
        if self.answer.done():  # asked no more
            connection.abort()
            return
        self.connection = connection
        size = len(self.body)
        more = f"Content-Type: application/json\r\nContent-Length: {size}\r\n" if size else ""
        head = f"{'POST' if size else 'GET'} {self.path} HTTP/1.1\r\nHost: vllm\r\nConnection: close\r\n{more}\r\n"
        connection.transport.write(head.encode() + self.body)
        connection.request_sent = True

    def head(self, head: ResponseHead) -> None:
        self.status = head.status
        self.dechunker = Dechunker() if head.framing is Framing.CHUNKED else None

    def whole(self, known: KnownAnswer, digits: bytes, body: bytes) -> None:
        self.status = known.status
        self.parts.append(body)
        self.ended()

    def data(self, data: bytes, in_chunk: bool) -> None:
        self.parts.append(self.dechunker.feed(data) if self.dechunker else data)

    def ended(self) -> None:
        self.connection = None  # where vLLM keeps it open, another's request may have it by now
        if not self.answer.done():
            self.answer.set_result((self.status, b"".join(self.parts)))

    def lost(self, error: UpstreamError) -> None:
        self.connection = None
        if not self.answer.done():
            self.answer.set_exception(error)
