"""The queue worker as the supervisor sees it: a child that is told the engine's state, and kept alive."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from supervisor.kept import KeptProgram
from supervisor.queue.jobs import JSON
from supervisor.secrets import SECRET_NAME

# The rules say what the worker may be given, and what its SDK can't bear.
RULES = tomllib.loads(Path(__file__).with_name("environment.toml").read_text(encoding="utf-8"))


def _is_needed(name: str) -> bool:
    """Says whether the worker gets the variable. Its only secret is the key by which RunPod knows it."""
    if not name.startswith(tuple(RULES["prefixes"])):
        return name.upper() in RULES["needed"]
    return name not in RULES["never"] and (name == RULES["secret"] or SECRET_NAME.search(name) is None)


def worker_environment(environ: Mapping[str, str], **options: object) -> dict[str, str]:
    """Returns the worker's environment: RunPod's variables, made safe for the SDK, and `options` for queue/sdk.py."""
    variables = {name: value for name, value in environ.items() if _is_needed(name)}
    for row in RULES["value"]:
        if re.fullmatch(row["where"], variables.get(row["name"], "")):
            variables[row["name"]] = row["becomes"]
    # The Hub's tests leave the variable unexpanded. Their address has no query, and the SDK appends `&...` to it.
    take_url = variables["RUNPOD_WEBHOOK_GET_JOB"].replace("$RUNPOD_POD_ID", variables.get("RUNPOD_POD_ID") or "local")
    variables["RUNPOD_WEBHOOK_GET_JOB"] = take_url if "?" in take_url else f"{take_url}?"
    return variables | {"SUPERVISOR_QUEUE": json.dumps(options)}


class QueueWorker(KeptProgram):
    """`run()` keeps the worker alive until `finish()`. `say()` tells the engine's state (starting, ready, restarting,
    failed), draining (it takes no more, and leaves when all is done) or expire (it fails what still runs, and leaves).
    `count` gets what the worker tells of a job (queue/delivery.py); `lose` is called when the worker dies."""

    def __init__(self, environ: Mapping[str, str], count: Callable[[JSON], object], lose: Callable[[], object]) -> None:
        self.log = logging.getLogger("supervisor.queue")
        warn = partial(self.log.warning, "%s", extra={"each": True})
        super().__init__(["supervisor.queue.sdk"], environ, self._child_died, (self._line_received, warn))
        self.count, self.lose = count, lose
        self.say("starting")

    async def finish(self, patience: float, reserve: float) -> None:
        """Gives the worker `patience` seconds to end its jobs, then `reserve` more to report the others as failed."""
        self.stop_requested.set()
        for word, seconds in (("draining", patience), ("expire", reserve)):
            self.say(word)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), seconds)
                return
        if self.child is not None:
            self.log.warning("the queue worker did not end: killed, and the jobs it had are lost")
            self.lose()
            self.child.kill()

    def _child_died(self, exit_text: str, delay: float) -> None:
        self.lose()
        self.log.error("the queue worker ended (%s), the jobs it had are lost: again in %.1f s", exit_text, delay)

    def _line_received(self, line: str) -> None:
        """Logs a line of the SDK's or of the worker's own. It is JSON, as RunPod's console reads it, or other text."""
        record: JSON = {"message": line}
        with contextlib.suppress(ValueError, TypeError):
            record |= json.loads(line)
        if isinstance(job := record.get("job"), dict):
            self.count(job)
        if record.get("message"):
            level = logging.getLevelNamesMapping().get(str(record.get("level")), logging.INFO)
            # `each`: every job has a line of its own, and none is too much.
            self.log.log(level, "%s", record["message"], extra={"request": record.get("requestId"), "each": True})
