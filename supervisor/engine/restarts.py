"""Whether a failed engine is started again, and when.

Never ready and a permanent cause: no. Otherwise yes, up to a limit in a window of time: at once the first time after it
had been ready, with backoff after that. tenacity counts, waits and gives up; the window is ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter
from tenacity.wait import wait_base

# Seconds: 1, 2, 4 ... 30, and up to one more, so that workers that died of the same cause do not return in step.
LOADING = wait_exponential_jitter(multiplier=1, max=30, jitter=1)
# After an engine that had served: none, 1, 2, 4 ...
SERVING = wait_exponential_jitter(multiplier=0.5, max=30, jitter=1)


class EngineFailed(Exception):
    """One run of the engine. `permanent`: the same settings never worked and never will; `served`: it was ready."""

    def __init__(self, *, permanent: bool, served: bool) -> None:
        super().__init__()
        self.permanent = permanent
        self.served = served


class Restarts:
    """`await again(failure)` after each one. Failures older than the window are forgotten."""

    def __init__(
        self,
        limit: int,
        window: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.limit = limit
        self.window = window
        self.clock = clock
        self.failures: deque[float] = deque()
        self._attempts = AsyncRetrying(
            sleep=sleep,
            retry=retry_if_exception(lambda error: isinstance(error, EngineFailed) and not error.permanent),
            after=self._count,
            wait=_Pause(),
            stop=stop_after_attempt(limit + 1),
            before_sleep=self._tell,
            reraise=True,
        ).__aiter__()

    async def again(self, failure: EngineFailed, tell: Callable[[float, str], object]) -> str:
        """Returns when another start's time has come, with which one it is; `tell` gets that before the wait, and its
        seconds. Raises `failure` where there is to be none."""
        if not self.failures:
            self._attempt = await anext(self._attempts)
        self._told = tell
        with self._attempt:
            raise failure
        self._attempt = await anext(self._attempts)
        return self.count

    @property
    def count(self) -> str:
        return f"restart {len(self.failures)} of {self.limit}"

    def verdict(self, failure: EngineFailed) -> str:
        """Why there is no other start."""
        if failure.permanent:
            return "another start would end the same way"
        window = f"{self.limit} restarts in {self.window:g} s"
        return f"{window} is the limit (SUPERVISOR_MAX_RESTARTS, SUPERVISOR_RESTART_WINDOW)"

    def _count(self, state: RetryCallState) -> None:
        """An attempt, to tenacity, is one of those in the window."""
        now = self.clock()
        while self.failures and now - self.failures[0] > self.window:
            self.failures.popleft()
        self.failures.append(now)
        state.attempt_number = len(self.failures)

    def _tell(self, state: RetryCallState) -> None:
        self._told(state.upcoming_sleep, self.count)


class _Pause(wait_base):
    def __call__(self, retry_state: RetryCallState) -> float:
        assert retry_state.outcome is not None
        failure = retry_state.outcome.exception()
        assert isinstance(failure, EngineFailed)
        if failure.served:
            return SERVING(retry_state) if retry_state.attempt_number > 1 else 0.0
        return LOADING(retry_state)
