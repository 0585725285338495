"""What `/status` tells, and to whom.

Everything goes to administrators, to everybody where no keys are set at all, and over the private unix socket, which
only the supervisor's own user can open. Whoever else may ask is told what `FOR_EVERYBODY` names. With API keys alone
nobody is an administrator over HTTP.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from supervisor.gateway.counts import BOUNDS

if TYPE_CHECKING:
    from supervisor.gateway.app import EngineView
    from supervisor.gateway.counts import Counts
    from supervisor.gateway.policy import Policy

# How the server is and what it counts. The rest is how it is set up (settings, paths, vLLM's command), as which vLLM's
# own /server_info needs an admin key, and vLLM's log, which quotes what other clients sent. A list of what is shown and
# not of what is hidden: a new fact is hidden until somebody thinks about it.
FOR_EVERYBODY = frozenset({
    "state", "since", "reason", "pid", "phases", "progress", "expected_seconds", "model", "mode", "vllm_version",
    "last_failure", "restarts", "restarts_by_cause", "transitions", "in_flight", "waiting",
    "now", "bounds", "statuses", "buckets", "reads", "happened",
})  # fmt: skip
LOG_OF_FAILURE = "log_tail"  # within `last_failure`
TRANSITIONS = 30
LONGEST_LINE = 1000  # characters; vLLM's log may have a line of 64 kB
NUMBER = re.compile(r"[0-9]{1,15}")


def sees_all(policy: Policy, headers: list[tuple[bytes, bytes]], *, private: bool) -> bool:
    """`private`: asked over the unix socket."""
    return private or not (policy.api_keys or policy.admin_keys) or policy.identify(headers).admin


def lines_seen(query: bytes) -> int | None:
    """The N of `after=N`, 0 where it is no number; None where nobody asks for what is new."""
    value = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True)).get("after")
    if value is None:
        return None
    return int(value) if NUMBER.fullmatch(value) else 0


def told(
    status: Mapping[str, object], facts: Mapping[str, object], engine: EngineView, counts: Counts, reads: int,
    *, full: bool, after: int | None,
) -> dict[str, object]:  # fmt: skip
    """`status` and `facts` with what the page needs beside them, where it asks `after` a line of vLLM's log."""
    content = {**status, **facts}
    if after is not None:
        line, log = engine.log_after(after)
        content |= {
            "now": time.time(), "bounds": BOUNDS, "statuses": counts.statuses, "buckets": counts.buckets,
            "reads": reads, "happened": list(engine.timeline)[-TRANSITIONS:],
            "line": line, "log": [text[:LONGEST_LINE] for text in log],
        }  # fmt: skip
    if full:
        return content
    content = {name: value for name, value in content.items() if name in FOR_EVERYBODY}
    if isinstance(failure := content.get("last_failure"), Mapping):
        content["last_failure"] = {name: value for name, value in failure.items() if name != LOG_OF_FAILURE}
    return content
