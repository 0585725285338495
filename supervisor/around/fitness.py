"""Checks whether this machine can do the work, before vLLM takes the GPU, and tells RunPod where it can't.

The SDK's own checks come after vLLM is up: they import torch and make a context on every GPU, in memory that is full by
then, and end the worker where they fail. Ours are cheap, and a worker that fails them is replaced before it loads.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from supervisor.bounded import Call

# The driver has so many seconds to answer. One that hung in nvmlInit kept the supervisor deaf to every signal.
DRIVER_PATIENCE = 5.0
GPU_PATIENCE = 20.0  # seconds for a first look, in which the driver may have to begin on each of eight GPUs
# A start needs this at the very least; weights and caches have larger wants of their own.
MIN_DISK_BYTES = 200 * 1024 * 1024
REPORT_TIMEOUT = 2.0
MAX_REASON_LENGTH = 256


def check(environ: Mapping[str, str], folder: Path) -> tuple[str, str] | None:
    """Returns which check failed, and why; None where the machine is fit. Temporary files go to `folder`."""
    expected = environ.get("RUNPOD_GPU_COUNT", "")
    if expected.isdigit() and int(expected) > 0:
        call = Call(lambda: _check_gpus(int(expected)))
        silence = f"RunPod gave {expected} GPUs, and the driver does not answer in {GPU_PATIENCE:g} s"
        if problem := call.result() if call.wait(GPU_PATIENCE) else silence:
            return "gpu", problem
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < MIN_DISK_BYTES:
            return "disk", f"only {free // 1_000_000} MB are free in {folder}"
    return None


def _check_gpus(expected: int) -> str | None:
    try:
        import pynvml  # noqa: PLC0415

        pynvml.nvmlInit()
    except ImportError:
        return None  # there is nothing to ask with
    except pynvml.NVMLError as error:
        return f"RunPod gave {expected} GPUs, and the driver does not answer ({error})"
    try:
        count = pynvml.nvmlDeviceGetCount()
        for index in range(count):  # a GPU that fell off the bus answers this with an error
            pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError as error:
        return f"a GPU does not answer ({error})"
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return f"RunPod gave {expected} GPUs, and the driver shows {count}" if count < expected else None


def report(environ: Mapping[str, str], name: str, reason: str) -> None:
    """Sends one ping that names the check, as the SDK would; RunPod then gives the work to another machine."""
    import httpx  # noqa: PLC0415  # 0.2 s, and few machines need it

    url = environ.get("RUNPOD_WEBHOOK_PING", "").replace("$RUNPOD_POD_ID", environ.get("RUNPOD_POD_ID", ""))
    params = {"status": "unhealthy", "check": name, "reason": reason[:MAX_REASON_LENGTH]}
    with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, UnicodeError):
        key = environ.get("RUNPOD_AI_API_KEY", "")
        httpx.get(httpx.URL(url).copy_merge_params(params), headers={"Authorization": key}, timeout=REPORT_TIMEOUT)
