"""Reads MODEL, and says what to write for what it can't be. Where nobody names a model, the demo model is served."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from supervisor.bounded import try_bounded
from supervisor.settings.names import DEFAULTS, MESSAGES, advice
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.installed import Vllm
from supervisor.vllm.values import BadValue

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
DISK_PATIENCE = 3.0  # seconds for a disk to tell whether something is there; a network volume may hang
HUB_NAME = re.compile(r"(?!models--|-|(?i:true|false|yes|no|on|off|none|null)$)[\w.-]+(/[\w.-]+)?", re.ASCII)
BUCKET_URL = re.compile(r"(s3|gs|az)://.+", re.DOTALL)  # vLLM reads from these itself
# This is Ollama's form, and llama.cpp's: `org/name:Q4_K_M`.
QUANTIZED_NAME = re.compile(r"[\w.-]+/[\w.-]+:(ud-)?(i?q\d|tq\d|bf?16|f16|f32|mxfp4)\w*", re.ASCII | re.I)


def read(name: str, vllm: Vllm, catalogue: Catalogue, environ: Mapping[str, str]) -> str:
    """Returns the model as vLLM is to have it. Raises BadValue."""
    is_path = name.startswith(("/", "./", "../", "~"))
    path = os.path.normpath(os.path.expanduser(name)) if is_path else name  # noqa: PTH111  # ~nobody stays as it is
    exists = try_bounded(DISK_PATIENCE, Path(path).exists) if is_path or not HUB_NAME.fullmatch(name) else False
    is_gguf = QUANTIZED_NAME.fullmatch(name) or (name.lower().endswith(".gguf") and "/" in name)
    is_known = not is_path and (is_gguf or BUCKET_URL.fullmatch(name) or HUB_NAME.fullmatch(name))
    file = Path(path)
    if exists and try_bounded(DISK_PATIENCE, lambda: not file.is_file() and not (file.is_dir() and os.listdir(file))):  # noqa: PTH208
        raise BadValue("a folder with a model in it; there is nothing in this one")
    if exists is not False or is_known:  # where the disk hangs, the launch waits
        formats = [row.names for row in catalogue.by_key.values() if row.key in ("load_format", "quantization")]
        lacks_gguf = any(formats) and not any("gguf" in names for names in formats)  # it may have it where nobody knows
        if is_gguf and lacks_gguf and not vllm.may_have_plugins(environ):
            raise BadValue(MESSAGES["gguf"].format(version=vllm.version))
        return path
    raise BadValue(advice("instead", name))


def find_demo_obstacle(environ: Mapping[str, str]) -> str | None:
    """Returns what forbids the demo model here, in a few words, and None on a laptop, or where it is wanted."""
    signs = DEFAULTS["no laptop"]
    reasons = [f"{variable} is set" for variable in signs["variables"] if environ.get(variable)]
    reasons += [reason for name, reason in signs["files"].items() if Path(name).exists()]
    return reasons[0] if reasons and environ.get("SUPERVISOR_DEMO") != "1" else None  # scripts/up asks for it
