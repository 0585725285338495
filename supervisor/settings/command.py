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

# What is safer where somebody else sends the requests, unless the user set it.
DEFAULTS = {
    # What is fetched for a prompt may redirect to any host: vLLM compares none but the first with its list.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # uvicorn's: whose X-Forwarded-Proto counts. On the private socket nobody speaks but the gateway, and without it
    # vLLM's redirects lead from https to http.
    "FORWARDED_ALLOW_IPS": "*",
}


@dataclass(frozen=True, slots=True)
class Command:
    """What is executed. None of it may be shown as it is: see `secrets.Mask`."""

    argv: tuple[str, ...]
    environ: Mapping[str, str]
    fetches: bool = False  # the weights are fetched first, by the same process


@dataclass(frozen=True, slots=True)
class Serving:
    """What is known of a start beside the settings: `model` stands for MODEL, `environ` below what the user set."""

    model: str
    environ: Mapping[str, str]


def served_name(settings: Settings) -> str:
    """The name that clients use for the model."""
    names = settings.option("served_model_name")
    return str(names[0] if names else settings.model.value)


def child_environment(settings: Settings) -> dict[str, str]:
    """What the user set, less what is not the child's to see, and our defaults."""
    environ = {
        name: value
        for name, value in settings.environ.items()
        if name not in WITHHELD and not name.startswith(WITHHELD_PREFIXES)
    }
    if "://" in environ.get("VLLM_PORT", ""):  # Kubernetes', for a service named vllm: vLLM fails on it
        del environ["VLLM_PORT"]
    return environ | {name: value for name, value in DEFAULTS.items() if not environ.get(name)}


def build(settings: Settings, socket: str, folder: str, serving: Serving | None = None) -> Command:
    """The command that serves on the unix socket `socket`; vLLM's temporary files go to `folder`."""
    name = str(settings.model.value)
    argv = [*settings.vllm.command, "serve", serving.model if serving else name]
    argv += ["--headless"] if settings.cluster is not None and settings.cluster.headless else ["--uds", socket]
    for option, setting in settings.options:
        argv += option.argv(setting.value)
    if serving and serving.model != name and not settings.option("served_model_name"):
        argv += ["--served-model-name", name]  # clients do not ask for a folder
    argv += settings.vllm_args
    environ = child_environment(settings)
    # vLLM leaves sockets and files of its own behind when it is killed: a folder that goes with it catches them.
    environ |= {"TMPDIR": folder, "VLLM_RPC_BASE_PATH": folder}
    environ["PYTHONUNBUFFERED"] = "1"  # or the last lines before a crash are lost
    environ = (
        dict(serving.environ if serving else {}) | dict(settings.cluster.environ if settings.cluster else {}) | environ
    )
    if settings.is_demo:
        environ = demo.ENVIRONMENT | environ
    return Command(tuple(argv), environ)
