"""`supervisor fetch`: downloads the model, or says where it is; in the image's build, what bakes the weights in."""

from __future__ import annotations

import os
import sys

from supervisor.engine.workspace import temporary_folder
from supervisor.launch import fetch_command, python, weights_of
from supervisor.settings import environment as environments
from supervisor.settings import volume
from supervisor.settings.settings import Settings, SettingsError

EXIT_CANNOT = 3


def fetch(settings: Settings) -> int:
    """Does not return where there is something to download: the program that does it takes this process over.

    Its exit codes are 0, 3 where another try would end the same way, and 4 where it may not.
    """
    weights = weights_of(settings)
    for line in weights.passed_over:
        print(f"supervisor: {line}", file=sys.stderr)
    if not weights.download:
        print(f"supervisor: {settings.model.value}: {weights.source}")
        return 0 if weights.folder is not None else EXIT_CANNOT  # vLLM will have to fetch it by itself
    if not python(settings):
        raise SettingsError(["the download runs in vLLM's Python, which is not to be found: set SUPERVISOR_VLLM"])
    command = fetch_command(settings, weights)
    folder = str(temporary_folder(settings.environ) / f"vllm-supervisor-{os.getuid()}")
    environ = volume.hub_environment(settings.volume, settings.environ, folder)
    environ |= environments.environment(settings.environ)
    sys.stdout.flush()
    os.execvpe(command[0], command, environ)  # noqa: S606
