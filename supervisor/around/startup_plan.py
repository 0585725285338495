"""Keeps vLLM's start-up plan, the measured size of the KV cache, so that the next start need not measure it.

vLLM's worker writes it below VLLM_CACHE_ROOT when it was measured, and takes it when as much memory is free as then.
It tells its plans apart by the model and the GPU, but not by all options that matter, such as GPU_MEMORY_UTILIZATION:
so what was set is noted beside them, and plans without this note are forgotten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor.engine.run import Run
from supervisor.settings.settings import Settings

if TYPE_CHECKING:
    from supervisor.engine.diagnosis import Diagnosis

VARIABLE = "VLLM_ENABLE_STARTUP_PLAN"
ENVIRONMENT = {VARIABLE: "1"}
FOLDER, NOTE = "startup_plan", "settings"
APPLIED_LINE = "Applying persisted startup plan"


class StartupPlan:
    """`discard_stale` comes before vLLM reads it, `write_note` once it is ready, `forget` if a start with it failed."""

    def __init__(self, settings: Settings) -> None:
        inputs: list[object] = [[option.key, setting.value] for option, setting in settings.options]
        inputs += [*settings.vllm_args, settings.cluster is not None]
        inputs += sorted(item for item in settings.environ.items() if item[0].startswith(("VLLM_", "CUDA_", "NVIDIA_")))
        self.fingerprint = hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()
        self.folder: Path | None = None

    def discard_stale(self, run: Run) -> None:
        """Removes the plans of other settings."""
        if run.child is None:
            return
        environ = run.child.command.environ
        root = environ.get("VLLM_CACHE_ROOT") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/vllm"
        try:
            self.folder = Path(root).expanduser() / FOLDER
            if (self.folder / NOTE).read_text() != self.fingerprint:
                self._remove()
        except (OSError, ValueError, RuntimeError):  # no note, or none that can be read; RuntimeError: there is no home
            self._remove()

    def write_note(self) -> None:
        """Notes the settings that the plans are for."""
        with contextlib.suppress(OSError):
            if self.folder is not None and any(self.folder.glob("*.json")):
                (self.folder / NOTE).write_text(self.fingerprint)

    def is_suspect(self, run: Run, diagnosis: Diagnosis) -> bool:
        """Tells whether a start took a plan, and may have failed for that: not where somebody killed it."""
        was_killed = run.end_reason is None and run.code == -signal.SIGKILL
        may_be_cause = not run.was_ready or "memory" in diagnosis.cause.lower()
        return may_be_cause and not was_killed and any(APPLIED_LINE in line for line in run.log)

    def forget(self) -> str:
        self._remove()
        if self.folder is not None and self.folder.exists():
            return f"what an earlier start measured of the GPU's memory can't be forgotten: delete {self.folder}"
        return "what an earlier start measured of the GPU's memory is forgotten: the next one measures again"

    def _remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def make_startup_plan(settings: Settings) -> StartupPlan | None:
    """Returns a plan where the installed vLLM has such, and the user says nothing else."""
    from supervisor.vllm.catalogue import load  # noqa: PLC0415
    from supervisor.vllm.installed import VllmError  # noqa: PLC0415

    if not settings.knobs.fast_restart or settings.environ.get(VARIABLE):
        return None
    with contextlib.suppress(VllmError):
        if VARIABLE in load(settings.vllm, settings.cache).environment:
            return StartupPlan(settings)
    return None
