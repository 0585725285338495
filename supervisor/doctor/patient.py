"""The patient is what the doctor's checks look at, found out when the first of them asks; a row is what they return."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from supervisor.around.gpus import read_gpus
from supervisor.around.machine import Machine
from supervisor.doctor.hub import Hub, HubAnswer
from supervisor.engine.workspace import temporary_folder
from supervisor.repositories import find_weights, hub_cache, hub_env
from supervisor.secrets import Mask
from supervisor.settings import platform
from supervisor.settings.knobs import read_path
from supervisor.settings.settings import Settings
from supervisor.vllm import installed
from supervisor.weights import find, snapshot

OK, WARN, FAIL = "ok", "warn", "fail"
PYTHON_PATIENCE = 3.0  # vLLM's Python has so many seconds to answer; it takes 30 ms where nothing hangs
# This tells where torch would be imported from. The folder is the last line: what is in a .pth file may print as well.
# The working directory is in the path of `-c`, and not in that of a script.
FIND_TORCH = """
import sys
if not sys.path[0]:
    del sys.path[0]
import importlib.util, os
found = importlib.util.find_spec("torch")
print(flush=True)
os.write(1, os.fsencode(list(found.submodule_search_locations)[0] if found else ""))
os._exit(0)
"""
CUDA_VERSION = re.compile(r"^cuda\b[^=\n]*= *(?:None|'([\d.]+)')", re.MULTILINE)


class Row(NamedTuple):
    verdict: str
    text: str
    remedy: str = ""
    check: str = ""

    def apply_mask(self, mask: Mask) -> Row:
        return self._replace(text=mask(self.text), remedy=mask(self.remedy))


@dataclass(frozen=True)
class Patient:
    """What the checks look at. `problems` tell why there are no settings."""

    environ: Mapping[str, str]
    machine: Machine
    hub: Hub
    settings: Settings | None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    ask_gpus: Callable[[], dict[str, Any] | None] = field(default=read_gpus)

    @cached_property
    def gpus(self) -> dict[str, Any]:
        """What the driver says of the GPUs; it is empty where there is no driver to ask."""
        return self.ask_gpus() or {}

    @property
    def visible_gpus(self) -> list[dict[str, Any]]:
        """The GPUs that CUDA_VISIBLE_DEVICES leaves to vLLM, where it has numbers (a driver counts as `nvidia-smi`
        does); else all."""
        found = list(self.gpus.get("gpus") or ())
        words = [word.strip() for word in self.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        if not all(word.isdecimal() for word in words):
            return found
        return [found[int(word)] for word in words if int(word) < len(found)]

    @property
    def gpu_count(self) -> int:
        """The number of GPUs that vLLM will see."""
        present, declared = len(self.gpus.get("gpus") or ()), platform.count_gpus(self.environ)
        return present if declared is None or (present and declared > present) else declared

    @cached_property
    def vllm(self) -> installed.Vllm:
        """The vLLM of the settings, or else the one that is found. Raises VllmError."""
        if self.settings is not None:
            return self.settings.vllm
        cache = temporary_folder(self.environ) / "none"
        return installed.find(self.environ.get("SUPERVISOR_VLLM"), self.environ.get("PATH"), cache)

    @cached_property
    def torch_folder(self) -> Path | None:
        """The folder of torch: where vLLM's Python would import it from, or else beside vLLM."""
        try:
            vllm = self.vllm
        except installed.VllmError:
            return None
        fallback = next(installed.find_beside(Path(vllm.command[0]), "torch"), None)
        if vllm.python is None:
            return fallback
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            process = subprocess.run(
                [*vllm.python, "-B", "-c", FIND_TORCH], env=dict(self.environ), timeout=PYTHON_PATIENCE, check=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            folder = Path(os.fsdecode(process.stdout.rpartition(b"\n")[2]))
            if folder.is_absolute() and folder.is_dir():
                return folder
        return fallback

    @cached_property
    def torch_cuda(self) -> str | None:
        """The CUDA version that vLLM's torch is built for; empty for a CPU build, None where it can't be told."""
        with contextlib.suppress(OSError):
            if self.torch_folder and (found := CUDA_VERSION.search((self.torch_folder / "version.py").read_text())):
                return found[1] or ""
        return None

    @property
    def volume(self) -> Path | None:
        return self.settings.volume.path if self.settings and self.settings.volume else None

    @property
    def download_path(self) -> Path:
        """The folder to which the hub's client downloads."""
        placed = hub_env(self.settings.volume if self.settings else None, self.environ, "")
        return Path(read_path(self.option("download_dir", "")) or hub_cache({**placed, **self.environ}))

    @property
    def is_offline(self) -> bool:
        return find.is_offline(self.environ)

    @cached_property
    def weights(self) -> find.Weights | None:
        return find_weights(self.settings) if self.settings is not None else None

    def option(self, key: str, default: Any) -> Any:
        found = self.settings.option(key) if self.settings is not None else None
        return default if found is None else found

    @cached_property
    def remote_model(self) -> HubAnswer | None:
        """What the hub knows of the model, where it has to come from there."""
        if self.settings is None or self.weights is None or not self.weights.needs_download or self.is_offline:
            return None
        return self.hub.ask_model(str(self.settings.model.value), self.option("revision", "main"))

    @property
    def utilization(self) -> float:
        """The share of a GPU's memory that vLLM takes; 0.92 is its default."""
        return float(self.option("gpu_memory_utilization", 0.92))

    @property
    def rank_count(self) -> int:
        """The number of GPUs over which the model is spread."""
        return int(self.option("tensor_parallel_size", 1)) * int(self.option("pipeline_parallel_size", 1))

    @cached_property
    def weight_bytes(self) -> int | None:
        """The size of the weights that vLLM will read; None where it can't be told."""
        if self.weights is None:
            return None
        if (folder := self.weights.folder) is None:
            content = self.remote_model.content if self.remote_model else None
            rows = content.get("siblings") or () if isinstance(content, dict) else ()
            files = {str(row["rfilename"]): int(row.get("size") or 0) for row in rows}
        elif folder.is_file():  # a GGUF
            return folder.stat().st_size
        else:
            files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        wanted = snapshot.weights(files, str(self.option("load_format", "auto")).lower())
        return sum(files.get(name, 0) for name in wanted) or None
