"""The environment that vLLM gets: what the user set, as it was meant, less what is not the child's to see."""

from __future__ import annotations

import re
from collections.abc import Mapping

from supervisor.settings.names import DEFAULTS, OURS, WITHHELD, WITHHELD_PREFIXES
from supervisor.settings.sources import Found, Report
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.values import read_bool

# Variables that vLLM and its libraries read themselves, and that fail them where they are set to nothing, as compose's
# `${VAR:-}` and RunPod's Hub do: nine of thirteen that were tried ended vLLM with an error that names no variable.
THEIRS = re.compile(r"(VLLM|FLASHINFER|HF|HUGGING_?FACE|TRANSFORMERS|TORCHINDUCTOR|TRITON)_|CUDA_VISIBLE_DEVICES$")
MEANS_NONE = "CUDA_VISIBLE_DEVICES"  # set to nothing, it hides all GPUs


def cleaned(environ: Mapping[str, str], catalogue: Catalogue, report: Report) -> dict[str, str]:
    """Of the variables that others read: those that are set to something, as it was meant. vLLM reads some as yes or
    no by a number, and `false` would end it."""
    found = {}
    for name, value in environ.items():
        is_theirs = THEIRS.match(name) and name not in OURS
        read = _switch if name in catalogue.switches else str
        setting = report.setting(name, [Found(f"environment {name}", value)], read) if is_theirs and value else None
        if not is_theirs or (setting and setting.value) or name == MEANS_NONE:
            found[name] = setting.value if setting else value
    return found


def _switch(text: str) -> str:
    return text if text.lstrip("-").isdecimal() or not text else str(int(read_bool(text)))


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Less what is not the child's to see, and with our defaults."""
    defaults: dict[str, str] = DEFAULTS["vLLM's environment"]
    withheld = {name for name in environ if name in WITHHELD or name.startswith(WITHHELD_PREFIXES)}
    if "://" in environ.get("VLLM_PORT", ""):  # Kubernetes', for a service named vllm: vLLM fails on it
        withheld.add("VLLM_PORT")
    asked = {name: value for name, value in environ.items() if name not in withheld and (value or name not in defaults)}
    return defaults | asked
