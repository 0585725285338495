"""What MODEL may be: a folder, a name on the hub, an object store's address. What it is not is told with the line to
use instead, before anything is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from supervisor.bounded import within
from supervisor.settings.catalogue import Catalogue
from supervisor.settings.values import BadValue
from supervisor.settings.vllm import Vllm

# Seconds for a disk to tell whether something is there. A network volume may hang.
DISK_PATIENCE = 3.0
STORES = ("s3", "gs", "az")  # vLLM reads from these itself
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
SCHEME = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<rest>.*)", re.DOTALL)
HUB = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?|hf\.co/|huggingface\.co/)"
    r"(?P<name>[\w.-]+/[\w.-]+?)(?:\.git)?(?:/(?:tree|resolve|blob)/(?P<revision>[^/?#]+))?(?:[/?#].*)?",
    re.ASCII,
)
REVISION = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[\w./-]+)", re.ASCII)
# Of Ollama's kind, and of llama.cpp's: `org/name:Q4_K_M`.
TAGGED = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?):(?P<tag>[\w.-]+)", re.ASCII)
QUANTIZED = re.compile(r"(?i)(ud-)?(i?q\d|tq\d|bf?16|f16|f32|mxfp4)\w*")
EXPECTED = "a folder that is there, or a name such as org/model"
NO_GGUF = (
    "weights that vLLM {version} can read, and it has no GGUF (since 0.24 a plugin has it): take the model's "
    "safetensors, install the plugin beside vLLM, or take a vLLM before 0.24"
)


def read(name: str, vllm: Vllm | None, catalogue: Catalogue | None) -> str:
    """The model as vLLM is to have it. Raises BadValue."""
    if (hub := HUB.fullmatch(name)) is not None:
        more = f" and REVISION={hub['revision']}" if hub["revision"] not in (None, "main") else ""
        raise BadValue(f"the model's name alone: set MODEL={hub['name']}{more}")
    if (address := SCHEME.fullmatch(name)) is not None:
        if address["scheme"] == "file":
            raise BadValue(f"a folder without its scheme: set MODEL={address['rest']}")
        if address["scheme"] not in STORES or not address["rest"]:
            raise BadValue(f"{EXPECTED}, or an address such as s3://bucket/model ({', '.join(STORES)})")
        return name
    path = Path(name).expanduser() if not name.startswith("~") or _home(name) else Path(name)
    is_path = name.startswith(("/", "./", "../", "~"))
    there = within(DISK_PATIENCE, path.exists) if is_path or not NAME.fullmatch(name) else None
    if (name.lower().endswith(".gguf") and (is_path or "/" in name)) or _is_quantized(name):
        if vllm is not None and catalogue is not None and not can_read(vllm, catalogue, "gguf"):
            raise BadValue(NO_GGUF.format(version=vllm.version))
        return str(path) if is_path else name
    if is_path and there is False:  # a disk that hangs is the launch's to wait for
        raise BadValue(EXPECTED)
    if is_path or there:
        return str(path) if is_path else name
    if NAME.fullmatch(name):
        return name
    if (revised := REVISION.fullmatch(name)) is not None:
        raise BadValue(f"the revision apart: set MODEL={revised['name']} and REVISION={revised['revision']}")
    if TAGGED.fullmatch(name) is not None:
        raise BadValue("a name of the hub, such as Qwen/Qwen3-0.6B; this looks like Ollama's")
    raise BadValue(EXPECTED)


def _home(name: str) -> bool:
    try:
        Path(name).expanduser()
    except RuntimeError:  # ~nobody
        return False
    return True


def _is_quantized(name: str) -> bool:
    tagged = TAGGED.fullmatch(name)
    return tagged is not None and "/" in tagged["name"] and QUANTIZED.fullmatch(tagged["tag"]) is not None


def can_read(vllm: Vllm, catalogue: Catalogue, what: str) -> bool:
    """Whether the installed vLLM knows a format of weights, or a kind of quantization; True where nobody knows."""
    known = [option.names for option in catalogue.by_key.values() if option.key in ("load_format", "quantization")]
    return not any(known) or any(what in names for names in known) or vllm.has_plugins
