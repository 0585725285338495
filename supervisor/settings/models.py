"""What MODEL may be: a folder, a name on the hub, an object store's address. What it is not is told with the line to
use instead, before anything is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from supervisor.bounded import within
from supervisor.settings.names import INSTEAD
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.installed import Vllm
from supervisor.vllm.values import BadValue

# Seconds for a disk to tell whether something is there. A network volume may hang.
DISK_PATIENCE = 3.0
STORES = ("s3", "gs", "az")  # vLLM reads from these itself
NO_GGUF = (
    "weights that vLLM {version} can read, and it has no GGUF (since 0.24 a plugin has it): take the model's "
    "safetensors, install the plugin beside vLLM, or take a vLLM before 0.24"
)
NAME = re.compile(r"(?!models--)[\w.-]+(/[\w.-]+)?", re.ASCII)
STORED = re.compile(rf"({'|'.join(STORES)})://.+", re.DOTALL)
# Ollama's form, and llama.cpp's: `org/name:Q4_K_M`.
QUANTIZED = re.compile(r"[\w.-]+/[\w.-]+:(ud-)?(i?q\d|tq\d|bf?16|f16|f32|mxfp4)\w*", re.ASCII | re.I)


def read(name: str, vllm: Vllm | None, catalogue: Catalogue | None, environ: Mapping[str, str]) -> str:
    """The model as vLLM is to have it. Raises BadValue."""
    is_path = name.startswith(("/", "./", "../", "~"))
    path = os.path.normpath(os.path.expanduser(name)) if is_path else name  # noqa: PTH111  # ~nobody stays as it is
    there = within(DISK_PATIENCE, Path(path).exists) if is_path or not NAME.fullmatch(name) else False
    known = STORED.fullmatch(name) or NAME.fullmatch(name) or QUANTIZED.fullmatch(name)
    is_gguf = name.lower().endswith(".gguf") and "/" in name
    if there is not False or (known and not is_path) or (is_gguf and not is_path):  # a hanging disk: the launch waits
        if (is_gguf or QUANTIZED.fullmatch(name)) and not _reads_gguf(vllm, catalogue, environ):
            raise BadValue(NO_GGUF.format(version=vllm.version if vllm else ""))
        return path
    found, told = next(
        (found, told)
        for pattern, told in INSTEAD.items()
        if (found := re.compile(pattern, re.ASCII | re.DOTALL).fullmatch(name)) is not None
    )
    raise BadValue(told.format(**found.groupdict()))


def _reads_gguf(vllm: Vllm | None, catalogue: Catalogue | None, environ: Mapping[str, str]) -> bool:
    """True where nobody knows."""
    if vllm is None or catalogue is None:
        return True
    known = [option.names for option in catalogue.by_key.values() if option.key in ("load_format", "quantization")]
    return not any(known) or any("gguf" in names for names in known) or vllm.may_have_plugins(environ)
