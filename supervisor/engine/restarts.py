"""Whether a failed engine is started again, and when. Pure: the clock's reading is handed in.

Never ready and a permanent cause: no. Otherwise yes, up to a limit in a window of time: at once the first time after it
had been ready, with backoff after that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Seconds: 1, 2, 4 ... 30, and up to one more, so that workers that died of the same cause do not return in step.
FIRST, LONGEST, JITTER = 1, 30, 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """`delay` in seconds until the next start, None to give up; `reason` says why not, or which attempt it is."""

    delay: float | None
    reason: str


class Restarts:
    """`judge` after each failure. Failures older than the window are forgotten."""

    def __init__(self, limit: int, window: float) -> None:
        self.limit = limit
        self.window = window
        self.failures: deque[float] = deque()

    def judge(self, now: float, *, permanent: bool, served: bool) -> Verdict:
        """`permanent`: the same settings never worked and never will; `served`: this run of the engine was ready."""
        while self.failures and now - self.failures[0] > self.window:
            self.failures.popleft()
        self.failures.append(now)
        if permanent:
            return Verdict(None, "another start would end the same way")
        count = len(self.failures)
        if count > self.limit:
            window = f"{self.limit} restarts in {self.window:g} s"
            return Verdict(None, f"{window} is the limit (SUPERVISOR_MAX_RESTARTS, SUPERVISOR_RESTART_WINDOW)")
        delay = backoff(count) if not served else backoff(count - 1) if count > 1 else 0.0
        return Verdict(delay, f"restart {count} of {self.limit}")


def backoff(attempt: int) -> float:
    """Seconds before the attempt's start; the first is 1."""
    from tenacity import RetryCallState, Retrying, wait_exponential_jitter  # noqa: PLC0415  # 15 ms of every start

    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = attempt
    return wait_exponential_jitter(initial=FIRST, max=LONGEST, jitter=JITTER)(state)
