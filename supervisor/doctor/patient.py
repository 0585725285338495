"""What the checks of `supervisor doctor` look at, found out when the first of them asks; and what they return."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from supervisor.around.gpus import gpus
from supervisor.around.machine import Machine
from supervisor.doctor.hub import Answer, Hub
from supervisor.engine.workspace import temporary_folder
from supervisor.repositories import hub_cache, weights_of
from supervisor.secrets import Mask
from supervisor.settings import platform, volume
from supervisor.settings.settings import Settings
from supervisor.vllm import installed
from supervisor.weights import find, snapshot

OK, WARN, FAIL = "ok", "warn", "fail"
# vLLM's default for GPU_MEMORY_UTILIZATION.
UTILIZATION = 0.92
# For vLLM's Python, which takes 30 ms where nothing hangs.
ASKING_PATIENCE = 3.0
# Where torch would be imported from. Its folder is the last line: what is in a .pth file may print as well. The working
# directory is in the path of `-c`, and not in that of a script.
WHERE = """
import sys
if not sys.path[0]:
    del sys.path[0]
import importlib.util, os
found = importlib.util.find_spec("torch")
print(flush=True)
os.write(1, os.fsencode(list(found.submodule_search_locations)[0] if found else ""))
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Row:
    verdict: str
    text: str
    remedy: str = ""
    check: str = ""

    def named(self, check: str) -> Row:
        return dataclasses.replace(self, check=check)

    def masked(self, mask: Mask) -> Row:
        return dataclasses.replace(self, text=mask(self.text), remedy=mask(self.remedy))

    def as_dict(self) -> dict[str, str]:
        return {"check": self.check, "verdict": self.verdict, "found": self.text, "remedy": self.remedy}


@dataclass(frozen=True)
class Patient:
    """What the checks look at. `problems`: why there are no settings."""

    environ: Mapping[str, str]
    machine: Machine
    hub: Hub
    settings: Settings | None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    ask_gpus: Callable[[], dict[str, Any] | None] = field(default=gpus)

    @cached_property
    def gpus(self) -> dict[str, Any] | None:
        return self.ask_gpus()

    @property
    def visible(self) -> list[dict[str, Any]]:
        """Those that CUDA_VISIBLE_DEVICES leaves to vLLM, where it has numbers (a driver counts as `nvidia-smi` does);
        else all.
        """
        found = list((self.gpus or {}).get("gpus") or ())
        words = [word.strip() for word in self.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        if not all(word.isdecimal() for word in words):
            return found
        return [found[int(word)] for word in words if int(word) < len(found)]

    @cached_property
    def _vllm(self) -> installed.Vllm | None:
        with contextlib.suppress(installed.VllmError):
            return self.vllm
        return None

    @cached_property
    def vllm(self) -> installed.Vllm:
        """Raises VllmError."""
        if self.settings is not None:
            return self.settings.vllm
        cache = temporary_folder(self.environ) / "none"
        return installed.find(self.environ.get("SUPERVISOR_VLLM"), self.environ.get("PATH"), cache)

    @cached_property
    def site(self) -> Path | None:
        """Where vLLM's environment has its packages."""
        for folder in self._sites:
            if (folder / "torch").is_dir() or (folder / "vllm").is_dir():
                return folder
        return None

    @property
    def _sites(self) -> list[Path]:
        if self._vllm is None:
            return []
        prefix = Path(self._vllm.command[0]).resolve().parent.parent
        patterns = ("lib/python3*/site-packages", "lib/python3*/dist-packages")
        return [folder for pattern in patterns for folder in sorted(prefix.glob(pattern))]

    @cached_property
    def cuda(self) -> str | None:
        """The CUDA version that vLLM's torch is built for; empty for a CPU build, None where it can't be told."""
        torch = self._torch
        if torch is None:
            return None
        with contextlib.suppress(OSError):
            text = (torch / "version.py").read_text()
            if found := re.search(r"^cuda\b[^=\n]*= *(?:None|'([\d.]+)')", text, re.MULTILINE):
                return found[1] or ""
        for folder in torch.parent.glob("torch-*.dist-info"):
            if found := re.search(r"\+cu(\d+)(\d)\.dist-info", folder.name):
                return f"{found[1]}.{found[2]}"
            if "+cpu" in folder.name:
                return ""
        return None

    @property
    def _torch(self) -> Path | None:
        """The folder of vLLM's torch: beside vLLM, where it is there and nothing can come before it; else vLLM's Python
        is asked (a .pth file, the packages of the system or of the user, PYTHONPATH).
        """
        beside = [folder / "torch" for folder in self._sites if (folder / "torch").is_dir()]
        if len(beside) == 1 and next(beside[0].parent.glob("vllm*"), None) and not self.environ.get("PYTHONPATH"):
            return beside[0]
        return self._torch_asked() or next(iter(beside), None)

    def _torch_asked(self) -> Path | None:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            if python := self._python():
                done = subprocess.run(
                    [*python, "-B", "-c", WHERE], env=dict(self.environ), timeout=ASKING_PATIENCE, check=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                )  # fmt: skip
                folder = Path(os.fsdecode(done.stdout.rpartition(b"\n")[2]))
                return folder if folder.is_absolute() and folder.is_dir() else None
        return None

    def _python(self) -> tuple[str, ...]:
        """vLLM's; empty where it can't be told. A console script whose Python has a long path, or one with spaces, is a
        shell's, which becomes Python in its second line. Raises OSError and ValueError.
        """
        if self._vllm is None:
            return ()
        words = self._vllm.python or ()
        if any(Path(word).name.startswith("python") for word in words):
            return words
        if len(self._vllm.command) == 1:
            with Path(self._vllm.command[0]).open(encoding="utf-8") as file:
                second = shlex.split([file.readline(4096), file.readline(4096)][1])
            if second[:1] == ["exec"] and len(second) > 2:
                return (second[1],)
        return ()

    @property
    def downloads(self) -> Path:
        """Where the hub's client puts what it downloads."""
        placed = volume.hub_environment(self.settings.volume if self.settings else None, self.environ, "")
        return Path(self.option("download_dir", None) or hub_cache({**placed, **self.environ}))

    @property
    def offline(self) -> bool:
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        return any(self.environ.get(name, "").lower() in find.TRUE for name in names)

    @cached_property
    def weights(self) -> find.Weights | None:
        return weights_of(self.settings) if self.settings is not None else None

    @cached_property
    def remote(self) -> Answer | None:
        """What the hub knows of the model, where it has to come from there."""
        if self.settings is None or self.weights is None or not self.weights.download or self.offline:
            return None
        return self.hub.model(str(self.settings.model.value), self.settings.option("revision"))

    @cached_property
    def size(self) -> int | None:
        """Of the weights that vLLM will read, in bytes."""
        if self.settings is None or self.weights is None:
            return None
        load_format = str(self.settings.option("load_format") or "auto")
        folder = self.weights.folder
        if folder is not None and folder.is_file():  # a GGUF
            return folder.stat().st_size
        if folder is not None:
            files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        elif self.remote is not None and isinstance(self.remote.content, dict):
            rows = self.remote.content.get("siblings") or ()
            files = {str(row["rfilename"]): int(row.get("size") or 0) for row in rows}
        else:
            return None
        wanted = snapshot.weights(files, load_format)
        return sum(files.get(name, 0) for name in wanted) or None

    def config(self) -> Mapping[str, Any]:
        """The model's config.json; empty where there is none to be read."""
        content: Any = None
        if self.settings is not None and self.weights is not None:
            with contextlib.suppress(OSError, ValueError):
                if self.weights.folder is not None:
                    content = json.loads((self.weights.folder / "config.json").read_bytes())
                elif self.remote is not None and self.remote.status == 200:
                    revision = self.settings.option("revision") or "main"
                    content = self.hub.ask(f"/{self.settings.model.value}/resolve/{revision}/config.json").content
        return content if isinstance(content, dict) else {}

    def option(self, key: str, default: Any) -> Any:
        found = self.settings.option(key) if self.settings is not None else None
        return default if found is None else found

    @property
    def count(self) -> int:
        """How many GPUs vLLM will see."""
        seen = len((self.gpus or {}).get("gpus") or ())
        told = platform.gpus(self.environ)
        return seen if told is None or (seen and told > seen) else told
