"""What MODEL may be; what it is not is told with the line to use instead. Where nobody names one: the demo model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from supervisor.bounded import within
from supervisor.settings.names import DEFAULTS, INSTEAD, NO_GGUF, advice
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.installed import Vllm
from supervisor.vllm.values import BadValue

DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"
# Seconds for a disk to tell whether something is there. A network volume may hang.
DISK_PATIENCE = 3.0
NAME = re.compile(r"(?!models--|-|(?i:true|false|yes|no|on|off|none|null)$)[\w.-]+(/[\w.-]+)?", re.ASCII)
STORED = re.compile(r"(s3|gs|az)://.+", re.DOTALL)  # vLLM reads from these itself
# Ollama's form, and llama.cpp's: `org/name:Q4_K_M`.
QUANTIZED = re.compile(r"[\w.-]+/[\w.-]+:(ud-)?(i?q\d|tq\d|bf?16|f16|f32|mxfp4)\w*", re.ASCII | re.I)


def read(name: str, vllm: Vllm, catalogue: Catalogue, environ: Mapping[str, str]) -> str:
    """The model as vLLM is to have it. Raises BadValue."""
    is_path = name.startswith(("/", "./", "../", "~"))
    path = os.path.normpath(os.path.expanduser(name)) if is_path else name  # noqa: PTH111  # ~nobody stays as it is
    there = within(DISK_PATIENCE, Path(path).exists) if is_path or not NAME.fullmatch(name) else False
    is_gguf = QUANTIZED.fullmatch(name) or (name.lower().endswith(".gguf") and "/" in name)
    known = not is_path and (is_gguf or STORED.fullmatch(name) or NAME.fullmatch(name))
    at = Path(path)
    if there and within(DISK_PATIENCE, lambda: not at.is_file() and not (at.is_dir() and os.listdir(at))):  # noqa: PTH208
        raise BadValue("a folder with a model in it; there is nothing in this one")
    if there is not False or known:  # a hanging disk: the launch waits
        named = [row.names for row in catalogue.by_key.values() if row.key in ("load_format", "quantization")]
        lacks_gguf = any(named) and not any("gguf" in names for names in named)  # where nobody knows, it may have it
        if is_gguf and lacks_gguf and not vllm.may_have_plugins(environ):
            raise BadValue(NO_GGUF.format(version=vllm.version))
        return path
    raise BadValue(advice(INSTEAD, name))


def forbids_demo(environ: Mapping[str, str]) -> str | None:
    """What forbids the demo model here, in a few words; None on a laptop."""
    signs = DEFAULTS["no laptop"]
    told = [f"{variable} is set" for variable in signs["variables"] if environ.get(variable)]
    told += [told for name, told in signs["files"].items() if Path(name).exists()]
    return told[0] if told else None
