"""`supervisor fetch`: downloads the model and what vLLM reads beside it, or says where they are.

In the image's build it is what bakes the weights in.
"""

from __future__ import annotations

import os
import sys

from supervisor.engine.workspace import temporary_folder
from supervisor.repositories import beside_the_model, fetch_command, hub_env, model_of, python
from supervisor.settings.command import child_environment
from supervisor.settings.settings import Settings, SettingsError

EXIT_CANNOT = 3


def fetch(settings: Settings) -> int:
    """Does not return where there is something to download: the program that does it takes this process over.

    Its exit codes are 0, 3 where another try would end the same way, and 4 where it may not.
    """
    repositories = [model_of(settings), *beside_the_model(settings)[0]]
    wanted = [each for each in repositories if each.weights.download]
    for each in repositories:
        for line in each.weights.passed_over:
            print(f"supervisor: {line}", file=sys.stderr)
        if each not in wanted:
            print(f"supervisor: {each.name}: {each.weights.source}")
    if not wanted:  # vLLM will have to fetch by itself what is nowhere
        return 0 if all(each.weights.folder is not None for each in repositories) else EXIT_CANNOT
    if not python(settings):
        raise SettingsError(["the download runs in vLLM's Python, which is not to be found: set SUPERVISOR_VLLM"])
    command = fetch_command(settings, wanted)
    folder = str(temporary_folder(settings.environ) / f"vllm-supervisor-{os.getuid()}")
    environ = hub_env(settings.volume, settings.environ, folder)
    environ |= child_environment(settings.environ)
    sys.stdout.flush()
    os.execvpe(command[0], command, environ)  # noqa: S606
