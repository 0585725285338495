"""Whether a failed engine is started again, and when.

Never ready and a permanent cause: no. Otherwise yes, up to a limit in a window of time: at once the first time after it
had been ready, with backoff after that. tenacity counts, waits and gives up; the window is ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter

VARIABLES = "SUPERVISOR_MAX_RESTARTS, SUPERVISOR_RESTART_WINDOW"
# Seconds: 1, 2, 4 ... 30, and up to one more, so that workers that died of the same cause do not return in step. After
# an engine that had served it is none, 1, 2 ...
LOADING, SERVING = (wait_exponential_jitter(multiplier=first, max=30, jitter=1) for first in (1, 0.5))


@dataclass(eq=False)
class EngineFailed(Exception):
    """One run of the engine. `permanent`: the same settings never worked and never will; `served`: it was ready."""

    permanent: bool
    served: bool


class Restarts:
    """`await again(failure)` after each one. Failures older than the window are forgotten."""

    def __init__(
        self, limit: int, window: float, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self.limit = limit
        self.window = window
        self.clock = clock
        self.failures: deque[float] = deque()
        self._attempts = AsyncRetrying(
            sleep=sleep,
            retry=retry_if_exception(lambda error: isinstance(error, EngineFailed) and not error.permanent),
            after=self._count,
            wait=_pause,
            stop=stop_after_attempt(limit + 1),
            before_sleep=lambda state: self._tell(state.upcoming_sleep, f"restart {len(self.failures)} of {limit}"),
            reraise=True,
        ).__aiter__()

    async def again(self, failure: EngineFailed, tell: Callable[[float, str], None]) -> None:
        """Returns when another start's time has come; `tell` gets the seconds until then, and which one it is. Raises
        `failure` where there is to be none."""
        self._tell = tell
        if not self.failures:
            self._attempt = await anext(self._attempts)
        with self._attempt:
            raise failure
        self._attempt = await anext(self._attempts)

    def verdict(self, failure: EngineFailed) -> str:
        """Why there is no other start."""
        limit = f"{self.limit} restarts in {self.window:g} s is the limit ({VARIABLES})"
        return "another start would end the same way" if failure.permanent else limit

    def _count(self, state: RetryCallState) -> None:
        """To tenacity only the failures in the window are attempts."""
        now = self.clock()
        while self.failures and now - self.failures[0] > self.window:
            self.failures.popleft()
        self.failures.append(now)
        state.attempt_number = len(self.failures)


def _pause(state: RetryCallState) -> float:
    failure = state.outcome.exception() if state.outcome is not None else None
    if isinstance(failure, EngineFailed) and failure.served:
        return SERVING(state) if state.attempt_number > 1 else 0.0
    return LOADING(state)
