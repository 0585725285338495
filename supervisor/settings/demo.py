"""The bundled demo model: when it is served, and with which defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from supervisor.settings.sources import Found

MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"

# Below everything the user sets.
_OPTIONS: dict[str, object] = {
    "SERVED_MODEL_NAME": ["demo"],
    "MAX_MODEL_LEN": 2048,
    "ENABLE_AUTO_TOOL_CHOICE": True,
    "TOOL_CALL_PARSER": "hermes",
    "ENFORCE_EAGER": True,  # nothing to win from compiling 2 M parameters, and it halves the start
}
DEFAULTS = {variable: Found("demo model", value) for variable, value in _OPTIONS.items()}
ENVIRONMENT = {
    # GiB; vLLM's CPU build takes half of the machine's memory otherwise. Other builds do not read it.
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
# Asked once before it is called ready. On CPUs with AMX an eager vLLM 0.32.0 dies (SIGILL in its attention) when the
# first prompt that it ever computes has one or two tokens; after a longer one, such prompts are fine.
WARM_UP = b'{"prompt": "one two three four five six seven eight nine ten eleven twelve", "max_tokens": 1}'

# What tells that this is no laptop: there, a missing model is a mistake, not a wish for the demo.
PLATFORM_VARIABLES = ("RUNPOD_POD_ID", "KUBERNETES_SERVICE_HOST", "K_SERVICE", "SM_MODEL_DIR", "SUPERVISOR_IMAGE")
FILES = {
    "/.dockerenv": "this is a container",
    "/run/.containerenv": "this is a container",
    "/dev/nvidiactl": "this machine has a GPU",
    "/dev/kfd": "this machine has a GPU",
}


def platform(environ: Mapping[str, str]) -> str | None:
    """What forbids the demo model here, in a few words; None on a laptop."""
    told = [f"{variable} is set" for variable in PLATFORM_VARIABLES if environ.get(variable)]
    told += [told for name, told in FILES.items() if Path(name).exists()]
    return told[0] if told else None
