"""The access log has a line for each relayed request, once its answer is over, with its latency and its first byte's.

The event loop makes the lines, some at a time. What is the same in many of them is made once, by lines.py, which makes
all other lines: the line of a method, path and status, with gaps for the rest. No query, header or body is in it.
RunPod's jobs have a line of their own (queue/delivery.py).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from supervisor.gateway.record import describe
from supervisor.lines import LineStyle, clock, escape, iso

if TYPE_CHECKING:
    import asyncio

    from supervisor.gateway.record import Record

LOGGER = "supervisor.access"
FLUSH = 0.1  # seconds that a line waits for others
BATCH = 100  # lines that wait at most: making them takes 0.2 ms
MAX_PARTS = 1024  # so many are kept of each part of a line that comes again
NO_TIME = 0.0005  # seconds that stand for none: the loop's clock has whole milliseconds, and 0 means no first byte
LONGEST_PATH = 200  # bytes of a path that are shown
# By the log's level, answers from this status on have a line: a 5xx is a warning, and nothing here is an error.
FROM_STATUS = {"debug": 0, "info": 0, "warning": 500, "error": 1000}
UNITS = ("B", "kB", "MB", "GB")
# These stand for what differs from line to line. No such bytes of a client's get into a line (lines.escape).
GAP, SECONDS = "\0", "\1"


@dataclass(eq=False)
class AccessLog:
    """`request_ended(record)` is to be called for each request, and `flush()` before the end."""

    loop: asyncio.AbstractEventLoop
    form: LineStyle
    put: Callable[[bytes, int], None]  # writes these lines, and is told how many they are
    level: str = "info"  # the log's: at `warning` failures alone have lines, at `error` nothing has
    # Ids that no client made begin like this. Whoever has seen one can begin like it: so only letters and digits are
    # taken for ours.
    own_prefix: bytes = b" "

    def __post_init__(self) -> None:
        self.from_status = FROM_STATUS[self.level]
        self.mask, self.form = self.form.mask, replace(self.form, mask=str)
        self.batch: list[Record] = []
        self._shape = lru_cache(MAX_PARTS)(self._make_shape)
        self._foreign_id = lru_cache(MAX_PARTS)(self._masked_id)

    def request_ended(self, record: Record) -> None:
        """Is a watcher of the ports' door, which calls it with each request that is over; the line is made later."""
        if record.status < self.from_status:
            return
        if not self.batch:
            self.loop.call_later(FLUSH, self.flush)
        self.batch.append(record)
        if len(self.batch) >= BATCH:
            self.flush()

    def flush(self) -> None:
        batch, self.batch = self.batch, []
        if not batch:
            return
        try:
            self.put("".join(self._lines(batch)).encode("utf-8", "backslashreplace"), len(batch))
        except Exception:  # a fault here must not become the request's
            logging.getLogger("supervisor").exception("%d lines of access could not be made", len(batch))

    def forget(self) -> None:
        """Drops the kept parts of lines, because there are more secrets to mask from now on."""
        for kept in (self._shape, self._foreign_id, shown_path):
            kept.cache_clear()

    def _lines(self, batch: list[Record]) -> Iterator[str]:
        unix, as_json = self.unix_offset(), self.form.as_json
        for record in batch:
            at, seconds, size = record.over_at + unix, record.over_at - record.began, record.sent
            first = (record.first_at - record.began or NO_TIME) if record.first_at else 0.0
            unusual = describe(record) if record.code or record.client_left or record.cache_word or record.marks else ""
            request = record.request
            # The path is cut here, because it is kept with the shape.
            line = self._shape(request.method, request.path[: LONGEST_PATH + 1], record.status, record.address, unusual)
            if as_json:
                begun = _number(round(first * 10_000)) if first else "null"
                yield line % (iso(at), self._shown_id(record.request_id), _number(round(seconds * 10_000)), begun, size)
            else:  # the first byte of an answer that is not streamed is its last
                begun = f", first byte after {first:.3f} s" if 0 < first < seconds - 0.001 else ""
                yield line % (clock(int(at)), seconds, begun, _size(size), self._shown_id(record.request_id))

    def _make_shape(self, method: bytes, path: bytes, status: int, client: bytes, note: str) -> str:
        form, level = self.form, "INFO" if status < 500 else "WARNING"
        verb, place, source = method.decode("latin-1"), shown_path(self.mask, path), client.decode()
        what = f"{verb} {place} {status}"
        if form.as_json:
            line = form.json(
                level, LOGGER, what, 0.0, GAP, method=verb, path=place, status=status, seconds=GAP,
                first_byte_seconds=GAP, bytes=GAP, client=source, note=note or None,
            )  # fmt: skip
            gap = json.dumps(GAP)
            line = line.replace(iso(0.0), GAP, 1).replace(gap, f'"{GAP}"', 1).replace(gap, GAP)
        else:
            parts = (f"{what} in {SECONDS} s{GAP}", GAP, note, source and f"from {source}")
            text = f"{', '.join(filter(None, parts))} (request {GAP})"
            line = form.text(level, text, 0.0, None).replace(clock(0), GAP, 1)
        return line.replace("%", "%%").replace(SECONDS, "%.3f").replace(GAP, "%s") + "\n"

    def unix_offset(self) -> float:
        """Returns the seconds that the loop's time lacks of Unix time."""
        return time.time() - self.loop.time()

    def _shown_id(self, request_id: bytes) -> str:
        if request_id.startswith(self.own_prefix) and request_id.isalnum():
            return request_id.decode()
        return self._foreign_id(request_id)

    def _masked_id(self, request_id: bytes) -> str:
        shown = self.mask(request_id.decode("latin-1"))
        return json.dumps(shown)[1:-1] if self.form.as_json else escape(shown)


@lru_cache(MAX_PARTS)
def shown_path(mask: Callable[[str], str], path: bytes) -> str:
    text = escape(mask(path[:LONGEST_PATH].decode("utf-8", "backslashreplace")))
    return text if len(path) <= LONGEST_PATH else f"{text}..."


@lru_cache(MAX_PARTS)
def _number(ten_thousandths: int) -> str:
    return repr(ten_thousandths / 10_000)


@lru_cache(MAX_PARTS)
def _size(count: int) -> str:
    power = next((power for power in range(3) if count < 999.5 * 1000**power), 3)  # 999.5 kB are 1 MB, in three digits
    return f"{count / 1000**power:{'.3g' if count < 999.5e9 else '.0f'}} {UNITS[power]}"
