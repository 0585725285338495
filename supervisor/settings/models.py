"""What MODEL may be: a folder, a name on the hub, an object store's address. What it is not is told with the line to
use instead, before anything is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from supervisor.bounded import within
from supervisor.settings.catalogue import Catalogue
from supervisor.settings.values import BadValue
from supervisor.settings.vllm import Vllm

# Seconds for a disk to tell whether something is there. A network volume may hang.
DISK_PATIENCE = 3.0
STORES = ("s3", "gs", "az")  # vLLM reads from these itself
EXPECTED = "a folder that is there, or a name such as org/model"
NO_GGUF = (
    "weights that vLLM {version} can read, and it has no GGUF (since 0.24 a plugin has it): take the model's "
    "safetensors, install the plugin beside vLLM, or take a vLLM before 0.24"
)
NAME = re.compile(r"(?!models--)[\w.-]+(/[\w.-]+)?", re.ASCII)
STORED = re.compile(rf"({'|'.join(STORES)})://.+", re.DOTALL)
# Ollama's form, and llama.cpp's: `org/name:Q4_K_M`.
QUANTIZED = re.compile(r"[\w.-]+/[\w.-]+:(ud-)?(i?q\d|tq\d|bf?16|f16|f32|mxfp4)\w*", re.ASCII | re.I)
# What people write for a model's name, and what to say of it. The first that fits speaks.
INSTEAD: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII | re.DOTALL), told)
    for pattern, told in (
        (
            r"(?:https?://(?:www\.)?|hf://(?:models/)?)?(?:huggingface\.co/|hf\.co/|(?<=hf://)|(?<=hf://models/))"
            r"(?P<name>[\w.-]+/[\w.-]+?(?::[\w.-]+)?)(?:\.git)?(?:/(?:tree|resolve|blob)/main)?/?(?:[?#].*)?",
            "the model's name alone: set MODEL={name}",
        ),
        (
            r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>[\w.-]+/[\w.-]+)/(?:tree|resolve|blob)/"
            r"(?P<revision>[^/?#]+).*",
            "the model's name alone: set MODEL={name} and REVISION={revision}",
        ),
        (
            r"https?://(?:www\.)?modelscope\.(?:cn|ai)/models/(?P<name>[\w.-]+/[\w.-]+)(?:[/?#].*)?",
            "the model's name alone: set MODEL={name} and VLLM_USE_MODELSCOPE=true",
        ),
        (r"file://(?P<name>/.*)", "a folder without a scheme: set MODEL={name}"),
        (r"[\w+.-]+://.*", f"{EXPECTED}, or an address such as s3://bucket/model ({', '.join(STORES)})"),
        (
            r"(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[\w./-]+)",
            "the revision apart: set MODEL={name} and REVISION={revision}",
        ),
        # As the hub's cache calls its folders; with too many slashes; with Windows' own.
        (
            r"(?:.*/)?models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)/?",
            f"{EXPECTED}: for the hub's model set MODEL={{org}}/{{name}}",
        ),
        (
            r"/?(?P<org>[\w.-]+)[/\\]+(?P<name>[\w.-]+)/*",
            f"{EXPECTED}: for the hub's model set MODEL={{org}}/{{name}}",
        ),
        (
            r"[\w.-]+(?:/[\w.-]+)?:[\w.-]+",
            "a name of the hub, such as Qwen/Qwen3-0.6B; this looks like Ollama's",
        ),
        (r".*", EXPECTED),
    )
)


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
    for pattern, told in INSTEAD:
        if (found := pattern.fullmatch(name)) is not None:
            raise BadValue(told.format(**found.groupdict()))
    raise AssertionError(name)


def _reads_gguf(vllm: Vllm | None, catalogue: Catalogue | None, environ: Mapping[str, str]) -> bool:
    """True where nobody knows."""
    if vllm is None or catalogue is None:
        return True
    known = [option.names for option in catalogue.by_key.values() if option.key in ("load_format", "quantization")]
    return not any(known) or any("gguf" in names for names in known) or vllm.may_have_plugins(environ)
