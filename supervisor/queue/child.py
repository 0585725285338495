"""The queue worker as the supervisor sees it: a child that is told the engine's state, and kept alive."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from typing import Protocol

from supervisor.kept import Kept
from supervisor.queue.errors import JSON
from supervisor.secrets import SECRET_NAME

LEVELS = frozenset({"NOTSET", "TRACE", "DEBUG", "INFO", "WARN", "ERROR"})
# What the worker is given besides RunPod's own variables, beside a hundred packages that are not ours.
NEEDED = frozenset({
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
})  # fmt: skip
RUNPODS_KEY = "RUNPOD_AI_API_KEY"


def _is_needed(name: str) -> bool:
    """The only secret is the key by which RunPod knows the worker."""
    if name.startswith("RUNPOD_"):
        return name == RUNPODS_KEY or SECRET_NAME.search(name) is None
    return name.upper() in NEEDED or name.startswith("PYTHON")


def environment(environ: Mapping[str, str], **about: object) -> dict[str, str]:
    """What the worker is started with: RunPod's own variables, made safe for the SDK, and `about`, for queue/sdk.py.

    The SDK reads most of these while it is imported, and has no other way to be told.
    """
    found = {name: value for name, value in environ.items() if _is_needed(name)}
    # By default it logs every token, and at INFO three lines for each job, beside ours. RunPod sets RUNPOD_DEBUG_LEVEL;
    # a level that it does not know ends its import.
    if found.get("RUNPOD_LOG_LEVEL") not in LEVELS:
        found["RUNPOD_LOG_LEVEL"] = "WARN"
    # Its checks import torch and take memory on each GPU after vLLM has filled it. Ours come before: around/fitness.py.
    found.setdefault("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")
    found.setdefault("RUNPOD_SKIP_GPU_CHECK", "true")
    # Below 1000 ms it becomes zero, and the heartbeat dies of that without a word.
    interval = found.get("RUNPOD_PING_INTERVAL", "")
    if interval and (not interval.isdigit() or int(interval) < 1000):
        found["RUNPOD_PING_INTERVAL"] = "1000" if interval.isdigit() else "10000"
    # The Hub's tests give an address without a query, to which the SDK appends `&...`, and the variable unexpanded.
    take = found["RUNPOD_WEBHOOK_GET_JOB"].replace("$RUNPOD_POD_ID", found.get("RUNPOD_POD_ID") or "local")
    found["RUNPOD_WEBHOOK_GET_JOB"] = take if "?" in take else f"{take}?"
    # With this it would serve HTTP instead of the queue.
    found.pop("RUNPOD_REALTIME_PORT", None)
    # With this a line of log and its end are two writes, and the heartbeat's gets in between.
    found.pop("PYTHONUNBUFFERED", None)
    found.setdefault("RUNPOD_ENDPOINT_ID", "none")  # without it the SDK's lines of log are no JSON
    return found | {"SUPERVISOR_QUEUE": json.dumps(about)}


class Counts(Protocol):
    """Who counts jobs."""

    def report(self, job: JSON) -> None:
        """What the worker tells of one (queue/delivery.py)."""

    def worker_died(self) -> None: ...


class QueueWorker(Kept):
    """`run()` keeps it alive until `finish()`. What `say()` tells it: starting, ready, restarting, failed (the engine's
    states); draining: take nothing more, and leave when all is done; expire: fail what still runs, and leave."""

    def __init__(self, environ: Mapping[str, str], counts: Counts) -> None:
        super().__init__(["supervisor.queue.sdk"], environ, self._died, (self._said, self._complained))
        self.log = logging.getLogger("supervisor.queue")
        self.counts = counts
        self.say("starting")

    async def finish(self, patience: float, reserve: float) -> None:
        """Lets it end its jobs for `patience` seconds, then has it report the others as failed for `reserve` more."""
        self.leaving.set()
        for word, seconds in (("draining", patience), ("expire", reserve)):
            self.say(word)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.ended.wait()
                    return
        if self.child is not None:
            self.log.warning("the queue worker did not end: killed")
            self.child.kill()

    def _died(self, how: str, again: float) -> None:
        self.counts.worker_died()
        self.log.error("the queue worker ended (%s), the jobs it had are lost: again in %.1f s", how, again)

    def _said(self, line: str) -> None:
        """The SDK's lines, and the worker's own: JSON, as RunPod's console reads it; or whatever was printed."""
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            said = {"message": line}
        if isinstance(job := said.get("job"), dict):
            self.counts.report(job)
        if said.get("message"):
            level = logging.getLevelNamesMapping().get(str(said.get("level")), logging.INFO)
            # `each`: of a job's own line none is too much.
            self.log.log(level, "%s", said["message"], extra={"request": said.get("requestId"), "each": True})

    def _complained(self, line: str) -> None:
        self.log.warning("%s", line, extra={"each": True})
