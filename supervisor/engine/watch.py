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
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def look_soon(self) -> None:
        """There may be more parts than at the last look."""
        self._wake.set()

    async def look(self) -> None:
        """Finds the parts that there are now, and attends to each."""
        for pid, name in (await self.survey()).items():
            if pid not in self.descriptors:
                self._attend(pid, name)

    async def run(self) -> None:
        try:
            while True:
                self._wake.clear()
                await self.look()
                try:
                    async with asyncio.timeout(SERVING_INTERVAL if self.ready() else LOADING_INTERVAL):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        except TimeoutError:  # /proc hangs: another look would take another thread for good
            await asyncio.Event().wait()
        finally:
            for descriptor in self.descriptors.values():
                self._loop.remove_reader(descriptor)
                os.close(descriptor)

    def _attend(self, pid: int, name: str) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self.died(f"{name} (pid {pid}) died")
            return
        except OSError:
            return  # forbidden here: then vLLM's own exit, 2 s later, has to do
        self.descriptors[pid] = descriptor
        self._loop.add_reader(descriptor, self._ended, pid, name)

    def _ended(self, pid: int, name: str) -> None:
        self._loop.remove_reader(self.descriptors[pid])
        self.died(f"{name} (pid {pid}) died")
