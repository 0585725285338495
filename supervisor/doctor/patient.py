"""What the checks of `supervisor doctor` look at, found out when the first of them asks; and what they return."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from supervisor.engine import gpu
from supervisor.engine.machine import Machine
from supervisor.engine.remains import temporary_folder
from supervisor.settings import platform, vllm, volume
from supervisor.settings.secrets import Mask
from supervisor.settings.sources import Settings
from supervisor.spawn import weights_of
from supervisor.weights import find, snapshot
from supervisor.weights.hub import Answer, Hub

OK, WARN, FAIL = "ok", "warn", "fail"
# vLLM's default for GPU_MEMORY_UTILIZATION.
UTILIZATION = 0.92


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
    ask_gpus: Callable[[], dict[str, Any] | None] = field(default=gpu.survey)

    @cached_property
    def gpus(self) -> dict[str, Any] | None:
        return self.ask_gpus()

    @cached_property
    def vllm(self) -> vllm.Vllm:
        """Raises VllmError."""
        if self.settings is not None:
            return self.settings.vllm
        cache = temporary_folder(self.environ) / "none"
        return vllm.find(self.environ.get("SUPERVISOR_VLLM"), self.environ.get("PATH"), cache)

    @cached_property
    def site(self) -> Path | None:
        """Where vLLM's environment has its packages."""
        with contextlib.suppress(vllm.VllmError):
            prefix = Path(self.vllm.command[0]).resolve().parent.parent
            for pattern in ("lib/python3*/site-packages", "lib/python3*/dist-packages"):
                for folder in sorted(prefix.glob(pattern)):
                    if (folder / "torch").is_dir() or (folder / "vllm").is_dir():
                        return folder
        return None

    @cached_property
    def cuda(self) -> str | None:
        """The CUDA version that vLLM's torch is built for; empty for a CPU build, None where it can't be told."""
        with contextlib.suppress(OSError):
            text = ((self.site or Path("/nowhere")) / "torch/version.py").read_text()
            if found := re.search(r"^cuda\b[^=\n]*= *(?:None|'([\d.]+)')", text, re.MULTILINE):
                return found[1] or ""
        for folder in self.site.glob("torch-*.dist-info") if self.site else ():
            if found := re.search(r"\+cu(\d+)(\d)\.dist-info", folder.name):
                return f"{found[1]}.{found[2]}"
            if "+cpu" in folder.name:
                return ""
        return None

    @property
    def downloads(self) -> Path:
        """Where the hub's client puts what it downloads."""
        placed = volume.hub_environment(self.settings.volume if self.settings else None, self.environ, "")
        return Path(self.option("download_dir", None) or find.hub_cache({**placed, **self.environ}))

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
        wanted = snapshot.weights(files, load_format, lambda _: None) or ()
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
