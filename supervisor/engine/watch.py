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
    """`await Watch(survey, ready, died).run()` until it is cancelled."""

    def __init__(
        self,
        survey: Callable[[], Awaitable[Mapping[int, str]]],
        ready: Callable[[], bool],
        died: Callable[[str], object],
    ) -> None:
        """`survey` gives the parts that there are, pid -> name; `died` is called with what died."""
        self.survey = survey
        self.ready = ready
        self.died = died
        self.descriptors: dict[int, int] = {}
        self._loop = asyncio.get_running_loop()

    async def look(self) -> None:
        """Finds the parts that there are now, and attends to each. Raises TimeoutError where /proc hangs."""
        for pid, name in (await self.survey()).items():
            if pid not in self.descriptors:
                self._attend(pid, name)

    async def run(self) -> None:
        try:
            while True:
                await self.look()
                await asyncio.sleep(SERVING_INTERVAL if self.ready() else LOADING_INTERVAL)
        except TimeoutError:  # another look would take another thread for good; the pidfds are still told of
            await self._loop.create_future()
        finally:
            for descriptor in self.descriptors.values():
                self._loop.remove_reader(descriptor)
                os.close(descriptor)

    def _attend(self, pid: int, name: str) -> None:
        gone = f"{name} (pid {pid}) died"
        try:
            descriptor = self.descriptors[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            self.died(gone)
        except OSError:
            pass  # forbidden here: then vLLM's own exit, 2 s later, has to do
        else:
            self._loop.add_reader(descriptor, self._ended, descriptor, gone)

    def _ended(self, descriptor: int, gone: str) -> None:
        self._loop.remove_reader(descriptor)
        self.died(gone)
