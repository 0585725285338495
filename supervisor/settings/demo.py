"""The bundled demo model: when it is served, and with which defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from supervisor.settings.names import DEFAULTS

MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
# Asked once before it is called ready. On CPUs with AMX an eager vLLM 0.32.0 dies (SIGILL in its attention) when the
# first prompt that it ever computes has one or two tokens; after a longer one, such prompts are fine.
WARM_UP = b'{"prompt": "one two three four five six seven eight nine ten eleven twelve", "max_tokens": 1}'


def platform(environ: Mapping[str, str]) -> str | None:
    """What forbids the demo model here, in a few words; None on a laptop."""
    signs = DEFAULTS["no laptop"]
    told = [f"{variable} is set" for variable in signs["variables"] if environ.get(variable)]
    told += [told for name, told in signs["files"].items() if Path(name).exists()]
    return told[0] if told else None
