"""What the script `vllm` calls."""

import os
import runpy
import sys
import time
from pathlib import Path

import vllm
import vllm.platforms

FAKE = Path(__file__).resolve().parents[5] / "scripts" / "fake_vllm"


def main() -> None:
    forked = os.getpid() != vllm.IMPORTED_BY
    plainly = "zygote" not in sys.modules
    if (vllm.FAULT == "dies" and forked) or (vllm.FAULT == "dies-anyway" and not plainly):
        print("(APIServer pid=1) Traceback (most recent call last):\n(APIServer pid=1) ValueError: nobody knows this")
        sys.exit(1)
    while vllm.FAULT == "hangs" and forked:
        time.sleep(1)
    sys.argv[0] = str(FAKE)
    runpy.run_path(str(FAKE), run_name="__main__")
