"""Asks NVIDIA's library about the GPUs: for people, and whether their memory is free again. A new engine that starts
beside a dying one runs out of memory.

This needs the package nvidia-ml-py (`pynvml`), which vLLM's CUDA image has on its own side and ours installs where
there is a GPU; without it, or without a GPU, there is nothing to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from supervisor.around.fitness import DRIVER_PATIENCE
from supervisor.bounded import run_bounded
from supervisor.engine.run import Observer, Run

# A machine with NVIDIA's driver has one of these (WSL: the second). Asking the library instead costs 15 ms a start.
DRIVER_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap")
# So much may stay allocated: the driver's own memory, and contexts that other processes hold, change by this much.
SLACK_BYTES = 512 * 1024 * 1024
PATIENCE = 30.0
POLL_INTERVAL = 0.1


@contextlib.contextmanager
def _open_nvml() -> Iterator[Any]:
    """Yields NVML, ready to be asked; None without its package, a driver or a GPU (it has an error class for each)."""
    nvml: Any = None
    if any(map(os.path.exists, DRIVER_DEVICES)):
        with contextlib.suppress(Exception):
            import pynvml  # noqa: PLC0415

            pynvml.nvmlInit()
            nvml = pynvml
    try:
        yield nvml
    finally:
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()


def read_used_bytes() -> list[int] | None:
    """Returns the bytes in use on each GPU; None where that can't be known."""
    report = read_gpus()
    return None if report is None or "error" in report else [gpu["used"] for gpu in report["gpus"]]


def read_gpus() -> dict[str, Any] | None:
    """Returns `driver`; `cuda`, the latest that it takes, where it tells; and of each GPU in `gpus` its `name` and its
    memory in bytes: `total`, `used`, and where it is known `reserved`, which the driver keeps for itself. Returns None
    where there is no driver to ask."""
    with _open_nvml() as nvml:
        if nvml is None:
            return None
        try:
            handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
            rows = [{"name": nvml.nvmlDeviceGetName(handle), **_read_memory(nvml, handle)} for handle in handles]
            return {"driver": nvml.nvmlSystemGetDriverVersion(), "cuda": _read_cuda_version(nvml), "gpus": rows}
        except nvml.NVMLError as error:  # a GPU fell off the bus
            return {"driver": "", "gpus": [], "error": str(error)}


def _read_cuda_version(nvml: Any) -> str:
    """Returns the version of the `libcuda` that the loader finds, which may be newer than the driver's own."""
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        return f"{version // 1000}.{version % 1000 // 10}"
    return ""


def _read_memory(nvml: Any, handle: Any) -> dict[str, int]:
    """Counts as nvidia-smi does: `used` has nothing of `reserved`, which is 616 MiB of an H200 that nobody uses."""
    # Drivers before 510 have no such answer, and old versions of the package no such question.
    with contextlib.suppress(nvml.NVMLError, AttributeError, TypeError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return {"used": int(memory.used), "total": int(memory.total), "reserved": int(memory.reserved)}
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {"used": int(memory.used), "total": int(memory.total)}


async def ask_used_bytes() -> list[int] | None:
    """Returns what `read_used_bytes` does. Where the driver hangs, it logs that, and the memory is not known."""
    try:
        return await run_bounded(DRIVER_PATIENCE, read_used_bytes)
    except TimeoutError:
        text = "the GPU's driver did not answer in %g s: its memory is not looked at"
        logging.getLogger("supervisor.engine").warning(text, DRIVER_PATIENCE)
        return None


async def wait_until_freed(baseline: Sequence[int] | None, patience: float = PATIENCE) -> None:
    """Waits until no GPU holds more than it did before the engine was started; says so where it takes too long."""
    if baseline is None:
        return
    deadline = time.monotonic() + patience
    while (readings := await ask_used_bytes()) is not None:
        excess = max((used - base for used, base in zip(readings, baseline, strict=False)), default=0)
        if excess <= SLACK_BYTES:
            return
        if time.monotonic() > deadline:
            text = "%.1f GB of GPU memory are still held %g s after the engine's end"
            logging.getLogger("supervisor.engine").warning(text, excess / 1e9, patience)
            return
        await asyncio.sleep(POLL_INTERVAL)


class GpuMemory(Observer):
    """Another start waits until the memory that was free before the first one is free again."""

    def __init__(self) -> None:
        self.baseline: list[int] | None = None
        self._measure_task: asyncio.Task[None] | None = None

    def run_began(self, run: Run) -> None:
        if self._measure_task is None:  # vLLM imports for seconds before it takes any
            self._measure_task = asyncio.get_running_loop().create_task(self._measure())

    async def wait_until_clear(self) -> None:
        await wait_until_freed(self.baseline)

    async def _measure(self) -> None:
        self.baseline = await ask_used_bytes()
