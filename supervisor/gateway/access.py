"""The access log: a line for each relayed request, once its answer is over, with its latency and its first byte's.

The event loop makes the lines, some at a time. What is the same in many of them is made once, by the one who makes all
other lines (lines.py): the line of a method, path and status, with gaps for the rest. No query, header or body is in
it. RunPod's jobs have a line of their own (queue/delivery.py).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from supervisor.gateway.record import note
from supervisor.lines import Form, clock, iso, printable, unmasked

if TYPE_CHECKING:
    import asyncio

    from supervisor.gateway.record import Record

LOGGER = "supervisor.access"
FLUSH = 0.1  # seconds that a line waits for others
BATCH = 100  # lines that wait at most: making them takes 0.2 ms
KEPT = 1024  # of each part that comes again
TICK = 0.0005  # seconds: the loop's clock has whole milliseconds, and no time at all means no first byte
LONGEST_PATH = 200
# By the log's level: a 5xx is a warning, and nothing here is an error.
FROM_STATUS = {"debug": 0, "info": 0, "warning": 500, "error": 1000}
GAP, NUMBER = "%s", "%d"  # what differs from line to line: text, and what stands in JSON without quotes


class AccessLog:
    """`ended(record)` for each; `flush()` before the end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        form: Form,
        put: Callable[[bytes, int], None],
        level: str = "info",
        ours: bytes = b" ",
    ) -> None:
        """`put` writes lines, so many; above `level` info, those of failures alone. `ours`: how the ids begin that no
        client made."""
        self.ours = ours  # who has seen one can begin like it: no more than letters and digits are taken for ours
        self.from_status = FROM_STATUS[level]
        self.loop = loop
        self.form = unmasked(form)
        self.mask = form.mask
        self.put = put
        self.batch: list[Record] = []
        self._timer: asyncio.TimerHandle | None = None
        self._lines, shape = (self._json, self._json_shape) if form.as_json else (self._text, self._text_shape)
        self._shape = lru_cache(KEPT)(shape)
        self._foreign_id = lru_cache(KEPT)(self._masked_id)

    def ended(self, record: Record) -> None:
        """A watcher of the ports' door."""
        if record.status < self.from_status:
            return
        self.batch.append(record)
        if len(self.batch) >= BATCH:
            self.flush()
        elif self._timer is None:
            self._timer = self.loop.call_later(FLUSH, self.flush)

    def flush(self) -> None:
        batch, self.batch = self.batch, []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not batch:
            return
        try:
            self.put("".join(self._lines(batch)).encode("utf-8", "backslashreplace"), len(batch))
        except Exception:  # a fault here must not be the request's
            logging.getLogger("supervisor").exception("%d lines of access could not be made", len(batch))

    def forget(self) -> None:
        """There are more secrets from now on."""
        for kept in (self._shape, self._foreign_id, shown_path):
            kept.cache_clear()

    def _text(self, batch: list[Record]) -> Iterator[str]:
        unix = self.unix()
        for one in batch:
            seconds, first = one.over_at - one.began, (one.first_at - one.began or TICK) if one.first_at else 0.0
            yield self._shape_of(one) % (
                clock(int(one.over_at + unix)),
                seconds,
                # Of an answer that is not streamed it is the same.
                f", first byte after {first:.3f} s" if 0 < first < seconds - 0.001 else "",
                _size(one.sent),
                self._id(one.request_id),
            )

    def _text_shape(self, method: bytes, path: bytes, status: int, client: bytes, note: str) -> str:
        what = f"{method.decode('latin-1')} {shown_path(self.mask, path)} {status}"
        note = f", {note}" if note else ""
        source = f", from {client.decode()}" if client else ""
        text = f"{_literal(what)} in %.3f s%s, %s{_literal(note)}{_literal(source)} (request %s)"
        return self.form.text(_level(status), text, 0.0, None).replace(clock(0), GAP, 1) + "\n"

    def _json(self, batch: list[Record]) -> Iterator[str]:
        unix = self.unix()
        for one in batch:
            first = (one.first_at - one.began or TICK) if one.first_at else 0.0
            yield self._shape_of(one) % (
                iso(one.over_at + unix),
                self._id(one.request_id),
                _number(round((one.over_at - one.began) * 10_000)),
                _number(round(first * 10_000)) if first else "null",
                one.sent,
            )

    def _json_shape(self, method: bytes, path: bytes, status: int, client: bytes, note: str) -> str:
        verb, place = method.decode("latin-1"), shown_path(self.mask, path)
        line = self.form.json(
            _level(status), LOGGER, _literal(f"{verb} {place} {status}"), 0.0, GAP,
            method=_literal(verb), path=_literal(place), status=status, seconds=NUMBER, first_byte_seconds=NUMBER,
            bytes=NUMBER, client=_literal(client.decode()), note=_literal(note) if note else None,
        )  # fmt: skip
        return line.replace(iso(0.0), GAP, 1).replace(f'"{NUMBER}"', GAP) + "\n"

    def unix(self) -> float:
        """What the loop's time lacks of Unix time."""
        return time.time() - self.loop.time()

    def _shape_of(self, one: Record) -> str:
        unusual = note(one) if one.cut or one.gone or one.cached or one.marks else ""
        # What is kept of a path is bounded.
        request = one.request
        return self._shape(request.method, request.path[: LONGEST_PATH + 1], one.status, one.address, unusual)

    def _id(self, request_id: bytes) -> str:
        if request_id.startswith(self.ours) and request_id.isalnum():
            return request_id.decode()
        return self._foreign_id(request_id)

    def _masked_id(self, request_id: bytes) -> str:
        shown = self.mask(request_id.decode("latin-1"))
        return json.dumps(shown)[1:-1] if self.form.as_json else printable(shown)


def _level(status: int) -> str:
    return "INFO" if status < 500 else "WARNING"


def _literal(text: str) -> str:
    """As it stands beside gaps."""
    return text.replace("%", "%%")


@lru_cache(KEPT)
def shown_path(mask: Callable[[str], str], path: bytes) -> str:
    text = printable(mask(path[:LONGEST_PATH].decode("utf-8", "backslashreplace")))
    return text if len(path) <= LONGEST_PATH else f"{text}..."


@lru_cache(KEPT)
def _number(ten_thousandths: int) -> str:
    return repr(ten_thousandths / 10_000)


@lru_cache(KEPT)
def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
