"""The access log: a line for each relayed request, once its answer is over, with its latency and its first byte's.

The event loop only notes a request's numbers; the log's thread makes the line. No query, header or body is in it.
RunPod's jobs have a line of their own (queue/worker.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from supervisor.gateway.record import note
from supervisor.lines import Form, printable, unmasked

if TYPE_CHECKING:
    import asyncio

    from supervisor.gateway.record import Record

LOGGER = "supervisor.access"
FLUSH = 0.2  # seconds: a thread is not woken for each line
TICK = 0.0005  # seconds: the loop's clock has whole milliseconds, and no time at all means no first byte
LONGEST_PATH = 200
# By the log's level: a 5xx is a warning, and nothing here is an error.
FROM_STATUS = {"debug": 0, "info": 0, "warning": 500, "error": 1000}


class Answer(NamedTuple):
    """Of one request. Times in seconds, from its head; `first` is 0 where there was no first byte."""

    at: float  # Unix time of its end
    method: bytes
    path: bytes
    status: int
    seconds: float
    first: float
    sent: int  # bytes
    request_id: bytes
    client: bytes
    note: str


class AccessLog:
    """`ended(record)` for each; `flush()` before the end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        form: Form,
        later: Callable[[Callable[[], Sequence[str]]], None],
        level: str = "info",
        ours: bytes = b" ",
    ) -> None:
        """`later` has the log's thread make lines, and write them; above `level` info, those of failures alone. `ours`:
        how the ids begin that no client made."""
        self.ours = ours
        self.from_status = FROM_STATUS[level]
        self.loop = loop
        self.form = unmasked(form)
        self.mask = form.mask
        self.later = later
        self.batch: list[Answer] = []

    def ended(self, record: Record) -> None:
        """A watcher of the ports' door."""
        if record.status < self.from_status:
            return
        if not self.batch:
            self.loop.call_later(FLUSH, self.flush)
        began, first_at = record.began, record.first_at
        self.batch.append(
            Answer(
                time.time(),
                record.request.method,
                record.request.path,
                record.status,
                record.over_at - began,
                max(first_at - began, TICK) if first_at else 0.0,
                record.sent,
                record.request_id,
                record.address,
                note(record),
            )
        )

    def flush(self) -> None:
        if self.batch:
            batch, self.batch = self.batch, []
            self.later(lambda: [self._line(answer) for answer in batch])

    # In the log's thread

    def _line(self, answer: Answer) -> str:
        level = "INFO" if answer.status < 500 else "WARNING"
        path = shown_path(self.mask, answer.path)
        request_id = answer.request_id.decode("latin-1")
        if not answer.request_id.startswith(self.ours):
            request_id = self.mask(request_id)
        what = f"{answer.method.decode('latin-1')} {path} {answer.status}"
        if self.form.as_json:
            return self.form.json(
                level, LOGGER, what, answer.at, request_id,
                method=answer.method.decode("latin-1"), path=path, status=answer.status,
                seconds=round(answer.seconds, 4), first_byte_seconds=round(answer.first, 4) or None,
                bytes=answer.sent, client=answer.client.decode(), note=answer.note or None,
            )  # fmt: skip
        # Of an answer that is not streamed it is the same.
        first = f", first byte after {answer.first:.3f} s" if 0 < answer.first < answer.seconds - 0.001 else ""
        note = f", {answer.note}" if answer.note else ""
        client = f", from {answer.client.decode()}" if answer.client else ""
        text = f"{what} in {answer.seconds:.3f} s{first}, {_size(answer.sent)}{note}{client}"
        return self.form.text(level, text, answer.at, request_id)


@lru_cache(1024)
def shown_path(mask: Callable[[str], str], path: bytes) -> str:
    text = printable(mask(path[:LONGEST_PATH].decode("utf-8", "backslashreplace")))
    return text if len(path) <= LONGEST_PATH else f"{text}..."


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
