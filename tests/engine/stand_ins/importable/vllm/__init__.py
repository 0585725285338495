"""A vLLM to be imported (on PYTHONPATH), with what `around/zygote.py` looks at; served by scripts/fake_vllm.

FAKE_IMPORTED says how it misbehaves: `cuda` once it is imported, `cuda-later` when FAKE_IMPORTED_FILE exists, `dies` or
`hangs` where it serves in a process that was forked, `dies-anyway` in the first one as well, unless it is run plainly.
"""

import os
import sys
import types
from pathlib import Path

FAULT = os.environ.get("FAKE_IMPORTED", "")
LATER = Path(os.environ.get("FAKE_IMPORTED_FILE", "/none"))
IMPORTED_BY = os.getpid()

torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
    is_initialized=lambda: FAULT == "cuda" or (FAULT == "cuda-later" and LATER.exists())
)
sys.modules["torch"] = torch
