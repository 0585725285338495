"""Notices at once when a part of the engine dies: EngineCore, or a worker.

vLLM itself takes 2 s to notice, leaves with exit code 0, and leaves the workers behind. The parts are no children of
ours, so a pidfd stands for each: the kernel tells of its end without polling. Which parts there are is found by looking
now and then, for vLLM starts them one after the other while it loads.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping

# Seconds between two looks at the session: short while parts are still being started.
LOADING_INTERVAL, SERVING_INTERVAL = 0.5, 5.0


class Watch:
    """`await Watch(survey, is_ready, part_died).run()` goes on until it is cancelled."""

    def __init__(
        self,
        survey: Callable[[], Awaitable[Mapping[int, str]]],
        is_ready: Callable[[], bool],
        part_died: Callable[[str], object],
    ) -> None:
        """`survey` returns the parts that there are, pid -> name; `part_died` is called with what died."""
        self.survey = survey
        self.is_ready = is_ready
        self.part_died = part_died
        self.pidfds: dict[int, int] = {}
        self._loop = asyncio.get_running_loop()

    async def find_parts(self) -> None:
        """Finds the parts that there are now, and watches each. Raises TimeoutError where /proc hangs."""
        for pid, name in (await self.survey()).items():
            if pid not in self.pidfds:
                self._watch_part(pid, name)

    async def run(self) -> None:
        try:
            while True:
                await self.find_parts()
                await asyncio.sleep(SERVING_INTERVAL if self.is_ready() else LOADING_INTERVAL)
        except TimeoutError:  # another survey would take another thread for good; the pidfds still work
            await self._loop.create_future()
        finally:
            for pidfd in self.pidfds.values():
                self._loop.remove_reader(pidfd)
                os.close(pidfd)

    def _watch_part(self, pid: int, name: str) -> None:
        message = f"{name} (pid {pid}) died"
        try:
            pidfd = self.pidfds[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            self.part_died(message)
        except OSError:
            pass  # forbidden here: then vLLM's own exit, 2 s later, has to be enough
        else:
            self._loop.add_reader(pidfd, self._part_ended, pidfd, message)

    def _part_ended(self, pidfd: int, message: str) -> None:
        self._loop.remove_reader(pidfd)
        self.part_died(message)
