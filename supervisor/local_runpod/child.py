"""A supervisor in queue mode keeps a simulated RunPod alive beside it: a child on a socket that is bound already."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Sequence
from functools import partial

from supervisor.kept import KeptProgram

LOG = logging.getLogger("supervisor.queue")
# The simulator gets the keys by these variables of its environment, where no list of processes shows them.
CLIENT_KEYS, WORKER_KEY = "LOCAL_RUNPOD_KEYS", "LOCAL_RUNPOD_WORKER_KEY"


def runpod_variables(url: str, key: str = "local") -> dict[str, str]:
    """Returns what RunPod would set for a worker of the simulator at `url` (`http://127.0.0.1:8000/v2/local`)."""
    return {
        "RUNPOD_POD_ID": "local",
        "RUNPOD_ENDPOINT_ID": "local",
        "RUNPOD_AI_API_KEY": key,
        "RUNPOD_PING_INTERVAL": "4000",
        "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=local",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
        "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID?gpu=local",
    }


class LocalRunPod(KeptProgram):
    """`run()` keeps the simulator alive until `stop()`. Its jobs are lost with it; who asks then waits for the next."""

    def __init__(self, listener: socket.socket, keys: Sequence[str]) -> None:
        """Clients are asked for one of the `keys`, where there are any."""
        host, port = listener.getsockname()
        self.url = f"http://{host}:{port}/v2/local"
        worker_key = secrets.token_hex(16)
        self.variables = runpod_variables(self.url, worker_key)  # for the queue worker
        environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TZ") if name in os.environ}
        environ |= {CLIENT_KEYS: ",".join(keys), WORKER_KEY: worker_key}
        program = ["supervisor.local_runpod.simulator", "--fd", str(listener.fileno()), "--with-parent"]
        report_death = partial(LOG.error, "the simulated RunPod ended (%s), its jobs are lost: again in %.1f s")
        super().__init__(program, environ, report_death, descriptors=[listener.fileno()])

    def stop(self) -> None:
        """Ends the simulator, when nobody is left to post to it."""
        self.stop_requested.set()
        if self.child is not None:
            self.child.terminate()
