"""A worker as anybody would write one with the runpod SDK, with nothing in between. Started by tests as a process.

Its environment is RunPod's, and `PLAIN_JOBS`: how many at once; `PLAIN_HANDLER`: "generator" or "function".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

programs: list[str] = []
sys.addaudithook(lambda event, given: programs.append(str(given[0])) if event == "subprocess.Popen" else None)

import runpod  # noqa: E402

print(json.dumps({"run by the import": programs}), flush=True)


async def pieces(job: dict[str, Any]) -> AsyncIterator[Any]:
    # Text within the JSON: so half of a surrogate pair, which is no UTF-8, gets past the client.
    for piece in json.loads(job["input"]["pieces"]):
        yield piece


async def answer(job: dict[str, Any]) -> Any:
    return job["input"]["answer"]


if __name__ == "__main__":
    runpod.serverless.start(
        {
            "handler": {"generator": pieces, "function": answer}[os.environ["PLAIN_HANDLER"]],
            "concurrency_modifier": lambda _: int(os.environ["PLAIN_JOBS"]),
            "return_aggregate_stream": True,
        }
    )
