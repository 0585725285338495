"""The packages that are installed beside us: our extras (pyproject.toml), and one that clashes with ours."""

from __future__ import annotations

import sys
from dataclasses import replace

from supervisor.settings.settings import Settings, SettingsError

# The extra `runpod` brings these, for RunPod's queue and the simulated one.
RUNPOD_PACKAGES = ("aiohttp", "multidict", "runpod", "starlette", "urllib3", "yarl")


def check(settings: Settings) -> Settings:
    """Returns the settings, with one more warning where vLLM shares our environment. Raises SettingsError where the
    mode needs an extra that is not installed."""
    if settings.mode == "queue":
        from importlib.util import find_spec  # noqa: PLC0415

        if missing := [name for name in RUNPOD_PACKAGES if find_spec(name) is None]:
            remedy = "install the extra, pip install 'vllm-supervisor[runpod]'"
            raise SettingsError([f"queue mode needs {' and '.join(missing)}: {remedy}"])
    if not settings.vllm.is_beside_us:
        return settings
    warning = (
        f"vLLM and the supervisor share one environment ({sys.prefix}). vLLM's dependencies bring an unrelated package "
        "named supervisor, and each may overwrite the other's files: give the supervisor an environment of its own"
    )
    return replace(settings, warnings=(*settings.warnings, warning))
