"""`supervisor fetch`: downloads the model and what vLLM reads beside it, or says where they are.

The build of an image bakes the weights in with it.
"""

from __future__ import annotations

import os
import sys

from supervisor.engine.workspace import temporary_folder
from supervisor.repositories import fetch_command, find_companions, find_model, hub_env, python
from supervisor.settings.command import child_environment
from supervisor.settings.settings import Settings, SettingsError

EXIT_UNAVAILABLE = 3


def fetch(settings: Settings) -> int:
    """Does not return where there is something to download: the program that downloads takes this process over.

    Its exit code is 0, or 3 where another try would end the same way, or 4 where another try may end otherwise.
    """
    repositories = [find_model(settings), *find_companions(settings)[0]]
    downloads = [repository for repository in repositories if repository.weights.needs_download]
    for repository in repositories:
        for line in repository.weights.rejections:
            print(f"supervisor: {line}", file=sys.stderr)
        if repository not in downloads:
            print(f"supervisor: {repository.name}: {repository.weights.source}")
    if not downloads:  # vLLM will have to fetch by itself what was found nowhere
        return 0 if all(repository.weights.folder is not None for repository in repositories) else EXIT_UNAVAILABLE
    if not python(settings):
        raise SettingsError(["the download runs in vLLM's Python, which is not to be found: set SUPERVISOR_VLLM"])
    command = fetch_command(settings, downloads)
    folder = str(temporary_folder(settings.environ) / f"vllm-supervisor-{os.getuid()}")
    environ = hub_env(settings.volume, settings.environ, folder)
    environ |= child_environment(settings.environ)
    sys.stdout.flush()
    os.execvpe(command[0], command, environ)  # noqa: S606
