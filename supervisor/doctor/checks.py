"""What `supervisor doctor` checks: the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from supervisor.doctor import machine, model
from supervisor.doctor.patient import FAIL, OK, WARN, Patient, Row
from supervisor.engine.workspace import temporary_folder


def settings(patient: Patient) -> Iterable[Row]:
    if patient.settings is None:
        told = [Row(FAIL, problem) for problem in patient.problems]
    else:
        asked, mode = patient.settings.model, patient.settings.mode
        told = [Row(OK, f"valid: {asked.value} ({asked.source}), mode {mode}")]
    warnings = patient.settings.warnings if patient.settings is not None else patient.warnings
    return [*told, *(Row(WARN, warning) for warning in warnings)]


# In the order in which they are shown.
CHECKS: dict[str, Callable[[Patient], Row | Iterable[Row] | None]] = {
    "settings": settings,
    "vllm": machine.engine,
    "packages": machine.clash,
    "gpu": machine.gpus,
    "gpu memory": machine.gpu_memory,
    "driver": machine.driver,
    "shm": machine.shared_memory,
    "memory": machine.memory,
    "files": machine.files,
    "port": machine.port,
    "volume": machine.disk_volume,
    "cache": partial(
        machine.writable, lambda patient: patient.settings.cache if patient.settings else None,
        "our cache", "Set SUPERVISOR_CACHE_DIR, or each start compiles anew.", WARN,
    ),
    "downloads": partial(
        machine.writable, lambda patient: patient.downloads,
        "the hub's cache", "Set HF_HOME to a folder that can be written.", FAIL,
    ),
    "temporary": partial(
        machine.writable, lambda patient: temporary_folder(patient.environ),
        "temporary files", "Set TMPDIR, or mount a tmpfs on /tmp.", FAIL,
    ),
    "hub": model.hub,
    "clock": model.clock,
    "model": model.access,
    "disk": model.model_disk,
    "context": model.context,
    "media": model.media,
}  # fmt: skip
