"""Turns settings into the command line and the environment of `vllm serve`, and into both as a person may see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from supervisor.settings.names import DEFAULTS, WITHHELD, WITHHELD_PREFIXES
from supervisor.settings.settings import Settings


@dataclass(frozen=True, slots=True)
class Command:
    """What is executed. None of it may be shown as it is: see `secrets.Mask`."""

    argv: tuple[str, ...]
    environ: Mapping[str, str]
    fetches: bool = False  # the weights are fetched first, by the same process


class Start(NamedTuple):
    """A start has this beside the settings: `model` stands for MODEL, and `environ` ranks below what the user set."""

    model: str
    environ: Mapping[str, str]


def served_name(settings: Settings) -> str:
    """Returns the name that clients use for the model."""
    names = settings.option("served_model_name")
    return str(names[0] if names else settings.model.value)


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without what the child is not to see, and with our defaults."""
    defaults: dict[str, str] = DEFAULTS["vLLM's environment"]
    withheld = {name for name in environ if name in WITHHELD or name.startswith(WITHHELD_PREFIXES)}
    if "://" in environ.get("VLLM_PORT", ""):  # Kubernetes sets it for a service named vllm; vLLM fails on it
        withheld.add("VLLM_PORT")
    rest = {name: value for name, value in environ.items() if name not in withheld and (value or name not in defaults)}
    return defaults | rest


def build(settings: Settings, socket: str, folder: str, start: Start | None = None) -> Command:
    """Returns the command that serves on the unix socket `socket`. vLLM's temporary files go to `folder`."""
    model_name = str(settings.model.value)
    start = start or Start(model_name, {})
    argv = [*settings.vllm.command, "serve", start.model]
    argv += ["--headless"] if settings.cluster is not None and settings.cluster.is_headless else ["--uds", socket]
    for option, setting in settings.options:
        argv += option.argv(setting.value) if setting.name not in settings.in_file else ()
    if start.model != model_name and not settings.option("served_model_name"):
        argv += ["--served-model-name", model_name]  # clients do not ask for a folder
    argv += settings.vllm_args
    environ = {
        **(DEFAULTS["demo model's environment"] if settings.is_demo else {}),
        **start.environ,
        **(settings.cluster.environ if settings.cluster else {}),
        **child_environment(settings.environ),
        # vLLM leaves sockets and files of its own behind when it is killed: a folder that goes with it catches them.
        "TMPDIR": folder,
        "VLLM_RPC_BASE_PATH": folder,
        "PYTHONUNBUFFERED": "1",  # or the last lines before a crash are lost
    }
    return Command(tuple(argv), environ)
