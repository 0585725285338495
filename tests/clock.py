"""A loop whose time stands still until a test moves it."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

# Turns of the loop in one moment, after which nothing will ever come to rest.
MOST_TURNS = 20_000


class _Clock(selectors.DefaultSelector):
    """When nothing is left to do but to wait for a timer, the time is that timer's, as far as it may go."""

    now = 0.0
    limit = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events and timeout and self.now < self.limit:
            self.now = min(self.limit, self.now + timeout)
        return events


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Clock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now

    def settle(self) -> None:
        """Runs until nothing is left to do at this moment."""
        for _ in range(MOST_TURNS):
            if not self._ready and not self._due():  # type: ignore[attr-defined]
                return
            self.stop()  # after one turn
            self.run_forever()
        raise AssertionError(f"the loop is still busy after {MOST_TURNS} turns in one moment")

    def passes(self, seconds: float) -> None:
        """Moves the clock; every timer on the way rings in its turn."""
        self.settle()
        self.clock.limit = self.clock.now + seconds
        self.run_until_complete(asyncio.sleep(seconds))
        self.settle()

    def _due(self) -> bool:
        timers = self._scheduled  # type: ignore[attr-defined]
        return bool(timers) and timers[0]._when <= self.clock.now + self._clock_resolution  # type: ignore[attr-defined]
