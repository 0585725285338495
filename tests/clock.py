"""A loop whose time stands still until a test moves it.

    loop = Loop()
    loop.call_later(5, rang.append, 1)
    loop.passes(4.9)
    assert rang == []
    loop.passes(0.1)
    assert rang == [1]

All times are in seconds. Who makes a loop closes it.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

# After so many turns of the loop in one moment, it is held to be one that never comes to rest.
MOST_TURNS = 20_000


class _Clock(selectors.DefaultSelector):
    """A selector that does not wait: where the loop would wait for a timer, the time becomes that timer's instead.

    It never goes beyond `limit`. Sockets are still looked at.
    """

    now = 0.0  # the loop's time
    limit = 0.0  # how far the time may go by itself

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events and timeout and self.now < self.limit:
            self.now = min(self.limit, self.now + timeout)
        return events


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose `time` moves in `passes` alone."""

    def __init__(self) -> None:
        self.clock = _Clock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now

    def settle(self) -> None:
        """Runs callbacks until nothing is left to do at this moment; raises AssertionError where that has no end."""
        for _ in range(MOST_TURNS):
            if not self._ready and not self._due():  # type: ignore[attr-defined]
                return
            self.stop()  # makes `run_forever` return after one turn
            self.run_forever()
        raise AssertionError(f"the loop is still busy after {MOST_TURNS} turns in one moment")

    def passes(self, seconds: float) -> None:
        """Moves the clock so far; every timer on the way rings at its own time, and then the loop settles."""
        self.settle()
        self.clock.limit = self.clock.now + seconds
        self.run_until_complete(asyncio.sleep(seconds))
        self.settle()

    def _due(self) -> bool:
        """Returns whether a timer rings at this moment."""
        timers = self._scheduled  # type: ignore[attr-defined]
        return bool(timers) and timers[0]._when <= self.clock.now + self._clock_resolution  # type: ignore[attr-defined]
