"""Decides whether a failed engine is started again, and when.

One that was never ready is not, where the cause is permanent, or nobody knows it and the end was the same a moment ago.
Any other is, up to a limit in a window of time: at once the first time after it had been ready, with backoff after
that. tenacity counts, waits and gives up; the window is ours.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter

VARIABLES = "SUPERVISOR_MAX_RESTARTS, SUPERVISOR_RESTART_WINDOW"
# The waits are 1, 2, 4 ... 30 s, and up to one more, so that workers that died of the same cause do not return in step.
# After an engine that had been ready they are 0, 1, 2 ... s.
LOADING_BACKOFF, SERVING_BACKOFF = (wait_exponential_jitter(multiplier=first, max=30, jitter=1) for first in (1, 0.5))

# Seconds: a GPU that is paid for by the second must not fail five times for a reason that nobody has a row for.
REPEAT_WINDOW = 60.0
# Two ends that are the same differ in this: numbers of processes, addresses, times.
VARYING_PART = re.compile(r"0x[0-9a-f]+|\d+")


@dataclass(eq=False)
class EngineFailed(Exception):
    """One run of the engine failed. `permanent`: the same settings never worked and never will. `unknown_cause`: how it
    ended, where that is all that is known and it never was ready; else empty."""

    permanent: bool
    was_ready: bool
    unknown_cause: str = ""
    repeated: bool = False  # it ended as the one before it


class Restarts:
    """Await `wait_for_retry` after each failure. Those older than the window are forgotten where it was ready since."""

    def __init__(
        self, limit: int, window: float, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self.limit = limit
        self.window = window
        self.clock = clock
        self.failures: deque[float] = deque()
        self._last = ("", -REPEAT_WINDOW)  # how the last run ended, if its cause is unknown, and when
        self._attempts = AsyncRetrying(
            sleep=sleep,
            retry=retry_if_exception(lambda error: isinstance(error, EngineFailed) and not error.permanent),
            after=self._count,
            wait=_backoff,
            stop=stop_after_attempt(limit + 1),
            before_sleep=lambda state: self._announce(state.upcoming_sleep, f"restart {len(self.failures)} of {limit}"),
            reraise=True,
        ).__aiter__()

    async def wait_for_retry(self, failure: EngineFailed, announce: Callable[[float, str], None]) -> None:
        """Returns when another start's time has come; `announce` gets the seconds until then, and which one it is.
        Raises `failure` where there is to be none."""
        self._announce = announce
        (previous, time), self._last = self._last, (VARYING_PART.sub("", failure.unknown_cause), self.clock())
        failure.repeated = self._last[0] != "" and self._last[0] == previous and self._last[1] - time <= REPEAT_WINDOW
        failure.permanent |= failure.repeated
        if not self.failures:
            self._attempt = await anext(self._attempts)
        with self._attempt:
            raise failure
        self._attempt = await anext(self._attempts)

    def verdict(self, failure: EngineFailed) -> str:
        """Returns why there is no other start."""
        if failure.repeated:
            return "it ended twice in the same way within a minute"
        limit = f"{self.limit} restarts in {self.window:g} s is the limit ({VARIABLES})"
        return "another start would end the same way" if failure.permanent else limit

    def _count(self, state: RetryCallState) -> None:
        """Makes tenacity count the failures in the window, and all since the engine was last ready: by the window,
        starts that take minutes each would never reach the limit, and a GPU be paid for without end."""
        now = self.clock()
        failure = state.outcome.exception() if state.outcome is not None else None
        if isinstance(failure, EngineFailed) and failure.was_ready:
            while self.failures and now - self.failures[0] > self.window:
                self.failures.popleft()
        self.failures.append(now)
        state.attempt_number = len(self.failures)


def _backoff(state: RetryCallState) -> float:
    failure = state.outcome.exception() if state.outcome is not None else None
    if isinstance(failure, EngineFailed) and failure.was_ready:
        return SERVING_BACKOFF(state) if state.attempt_number > 1 else 0.0
    return LOADING_BACKOFF(state)
