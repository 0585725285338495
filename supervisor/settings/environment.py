"""The environment that vLLM gets: what the user set, as it was meant, less what is not the child's to see."""

from __future__ import annotations

import re
from collections.abc import Mapping

from supervisor.settings.names import OURS, WITHHELD, WITHHELD_PREFIXES
from supervisor.settings.sources import Found, Report
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.values import FALSE, TRUE, BadValue

# Variables that vLLM and its libraries read themselves, and that fail them where they are set to nothing, as compose's
# `${VAR:-}` and RunPod's Hub do: nine of thirteen that were tried ended vLLM with an error that names no variable.
THEIRS = re.compile(r"(VLLM|FLASHINFER|HF|HUGGING_?FACE|TRANSFORMERS|TORCHINDUCTOR|TRITON)_|CUDA_VISIBLE_DEVICES$")
MEANS_NONE = "CUDA_VISIBLE_DEVICES"  # set to nothing, it hides all GPUs

# What is safer where somebody else sends the requests, unless the user set it.
DEFAULTS = {
    # What is fetched for a prompt may redirect to any host: vLLM compares none but the first with its list.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # uvicorn's: whose X-Forwarded-Proto counts. On the private socket nobody speaks but the gateway, and without it
    # vLLM's redirects lead from https to http.
    "FORWARDED_ALLOW_IPS": "*",
}


def cleaned(environ: Mapping[str, str], report: Report) -> dict[str, str]:
    """Of the variables that others read: those that are set to something, as it was meant."""
    found = {}
    for name, value in environ.items():
        if THEIRS.match(name) is None or name in OURS:
            found[name] = value
            continue
        setting = report.setting(name, [Found(f"environment {name}", value)], str)
        if setting is not None and (setting.value or name == MEANS_NONE):
            found[name] = setting.value
    return found


def for_vllm(environ: Mapping[str, str], catalogue: Catalogue, report: Report) -> dict[str, str]:
    """With vLLM's own variables in its words: of those that are yes or no by a number, `false` would end it."""
    found = dict(environ)
    for name in filter(catalogue.switches.__contains__, environ):
        setting = report.setting(name, [Found(f"environment {name}", environ[name])], _switch)
        found[name] = setting.value if setting else ""
    return found


def _switch(text: str) -> str:
    if text.lstrip("-").isdecimal():
        return text
    if text.lower() not in TRUE | FALSE:
        raise BadValue("true or false (or 1, 0)")
    return str(int(text.lower() in TRUE))


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Less what is not the child's to see, and with our defaults."""
    found = {
        name: value
        for name, value in environ.items()
        if name not in WITHHELD and not name.startswith(WITHHELD_PREFIXES)
    }
    if "://" in found.get("VLLM_PORT", ""):  # Kubernetes', for a service named vllm: vLLM fails on it
        del found["VLLM_PORT"]
    return found | {name: value for name, value in DEFAULTS.items() if not environ.get(name)}
