"""Settings -> the command line and the environment of `vllm serve`, and both as a person may see them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from supervisor.settings import demo
from supervisor.settings.sources import MASK, Settings

# Variables that vLLM has no business to see: ours, and RunPod's secrets (a process list of the child shows them).
WITHHELD_PREFIXES = ("SUPERVISOR_", "RUNPOD_WEBHOOK_")
WITHHELD = frozenset({"RUNPOD_AI_API_KEY", "RUNPOD_API_KEY", "RUNPOD_ENDPOINT_SECRET"})

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|(^|_)KEYS?($|_)|API_?KEY")
# What a token looks like where its variable's name does not say so: the hub's, OpenAI's, RunPod's; a URL's password.
SECRET_TEXT = re.compile(r"\b(hf_|sk-|rpa_)[A-Za-z0-9_-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
SHORTEST_SECRET = 6  # a shorter value (`KEY=1`) is no secret, and masking it would garble every text


@dataclass(frozen=True, slots=True)
class Command:
    """What is executed. Neither field may be shown as it is: see `Mask`."""

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
    # vLLM leaves sockets and files of its own behind when it is killed: a folder that goes with it catches them.
    environ |= {"TMPDIR": folder, "VLLM_RPC_BASE_PATH": folder}
    environ["PYTHONUNBUFFERED"] = "1"  # or the last lines before a crash are lost
    if settings.is_demo:
        environ = demo.ENVIRONMENT | environ
    return Command(tuple(argv), environ)


class Mask:
    """Replaces every secret value of the environment, and everything that looks like a token."""

    def __init__(self, environ: Mapping[str, str], more: Iterable[str] = ()) -> None:
        values = {value for name, value in environ.items() if SECRET_NAME.search(name.upper())}
        values.update(more)
        known = sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)
        self.known = re.compile("|".join(map(re.escape, known))) if known else None

    @classmethod
    def of(cls, settings: Settings) -> Mask:
        return cls(settings.environ, settings.knobs.api_keys or ())

    def __call__(self, text: str) -> str:
        if self.known is not None:
            text = self.known.sub(MASK, text)
        return SECRET_TEXT.sub(MASK, text)

    def command(self, argv: Iterable[str]) -> str:
        """A command line as a person may see it, ready to paste but for what is masked."""
        return self(shlex.join(argv))
