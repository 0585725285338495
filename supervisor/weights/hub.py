"""The few questions that `supervisor doctor` has for the hub: one at a time, each asked once, with a short patience."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from supervisor.bounded import within
from supervisor.weights.find import hub_cache

PATIENCE = 3.0
ENDPOINT = "https://huggingface.co"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` is 0 where none came, and then `why` says why. `skew`: seconds that our clock is ahead of the hub's."""

    status: int
    content: Any = None
    why: str = ""
    skew: float | None = None


class Hub:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self.endpoint = (environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self.token = token(environ)
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def ask(self, path: str) -> Answer:
        with self._lock:
            # Where nobody answered, nobody will: the other checks are not kept waiting for that.
            silent = next((answer for answer in self._answers.values() if not answer.status), None)
            if silent is not None:
                return silent
            if path not in self._answers:
                # A name server that is silent, or an address for each of its lines, is not covered by the timeout.
                answer = within(PATIENCE + 1, lambda: self._ask(path))
                self._answers[path] = answer or Answer(0, why=f"no answer in {PATIENCE + 1:g} s")
            return self._answers[path]

    def hello(self) -> Answer:
        """Whether it is there, and what it thinks of our token, if we have one."""
        return self.ask("/api/whoami-v2")

    def model(self, name: str, revision: str | None) -> Answer:
        return self.ask(f"/api/models/{name}/revision/{urllib.parse.quote(revision or 'main', safe='')}?blobs=true")

    def _ask(self, path: str) -> Answer:
        if not self.endpoint.startswith(("http://", "https://")):
            return Answer(0, why=f"HF_ENDPOINT={self.endpoint} is no address")
        request = urllib.request.Request(self.endpoint + path)  # noqa: S310  # checked above
        if self.token:  # unredirected: not for whoever the hub might send us to
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        began = time.time()
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:  # noqa: S310
                status, headers, body = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            status, headers, body = error.code, error.headers, b""
        except ValueError:  # whose text may have the token in it
            return Answer(0, why="the address, or the token, has characters that it may not have")
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            return Answer(0, why=str(getattr(reason, "strerror", None) or reason) or type(reason).__name__)
        content = None
        with contextlib.suppress(ValueError):
            content = json.loads(body)
        skew = None
        with contextlib.suppress(TypeError, ValueError):
            skew = (began + time.time()) / 2 - parsedate_to_datetime(headers["Date"]).timestamp()
        return Answer(status, content, headers.get("X-Error-Message") or "", skew)


def token(environ: Mapping[str, str]) -> str:
    """As the hub's client looks for it."""
    for name in TOKENS:
        if environ.get(name, "").strip():
            return environ[name].strip()
    path = environ.get("HF_TOKEN_PATH")
    home = hub_cache({**environ, "HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": ""}).parent
    with contextlib.suppress(OSError, ValueError):
        return (Path(path) if path else home / "token").read_text().strip()
    return ""
