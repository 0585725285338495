"""Settings -> the command line and the environment of `vllm serve`, and both as a person may see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from supervisor.settings import demo
from supervisor.settings.sources import Settings

# Variables that vLLM has no business to see: ours, and RunPod's secrets (a process list of the child shows them).
WITHHELD_PREFIXES = ("SUPERVISOR_", "RUNPOD_WEBHOOK_")
WITHHELD = frozenset({"RUNPOD_AI_API_KEY", "RUNPOD_API_KEY", "RUNPOD_ENDPOINT_SECRET"})
# Ours by another name: vLLM warns of each VLLM_* that it does not know, and would ask for VLLM_API_KEY itself.
WITHHELD |= {"VLLM_API_KEY", "VLLM_CONFIG_FILE", "VLLM_EXTRA_ARGS", "VLLM_STARTUP_TIMEOUT", "VLLM_VERSION"}


@dataclass(frozen=True, slots=True)
class Command:
    """What is executed. Neither field may be shown as it is: see `secrets.Mask`."""

    argv: tuple[str, ...]
    environ: Mapping[str, str]


def build(settings: Settings, socket: str, folder: str) -> Command:
    """The command that serves on the unix socket `socket`; vLLM's temporary files go to `folder`."""
    argv = [*settings.vllm.command, "serve", str(settings.model.value), "--uds", socket]
    for option, setting in settings.options:
        argv += option.argv(setting.value)
    argv += settings.vllm_args
    environ = {
        name: value
        for name, value in settings.environ.items()
        if name not in WITHHELD and not name.startswith(WITHHELD_PREFIXES)
    }
    if "://" in environ.get("VLLM_PORT", ""):  # Kubernetes', for a service named vllm: vLLM fails on it
        del environ["VLLM_PORT"]
    # vLLM leaves sockets and files of its own behind when it is killed: a folder that goes with it catches them.
    environ |= {"TMPDIR": folder, "VLLM_RPC_BASE_PATH": folder}
    environ["PYTHONUNBUFFERED"] = "1"  # or the last lines before a crash are lost
    if settings.is_demo:
        environ = demo.ENVIRONMENT | environ
    return Command(tuple(argv), environ)
