"""What the queue worker tells the supervisor, which logs and counts it (queue/child.py): a line of JSON each.

The shape is that of the SDK's own lines: `requestId` is the job's. Beside it stands what is to be counted.
"""

from __future__ import annotations

import json
from typing import Any


def tell(
    message: str = "", level: str = "INFO", *, job_id: str | None = None, job: dict[str, Any] | None = None
) -> None:
    """`job`: `{"id", "outcome": "taken"}`, or how it ended with its seconds and POSTs."""
    line = {"requestId": job_id, "message": message, "level": level}
    print(json.dumps(line | ({"job": job} if job is not None else {})), flush=True)
