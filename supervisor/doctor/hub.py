"""The few questions that `supervisor doctor` asks the hub: one at a time, each only once, and with a short patience."""

from __future__ import annotations

import contextlib
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

from supervisor.bounded import try_bounded
from supervisor.repositories import expand, hub_cache

PATIENCE = 3.0
ENDPOINT = "https://huggingface.co"


class HubAnswer(NamedTuple):
    """What the hub answered. `status` is 0 where no answer came, and then `reason` says why."""

    status: int
    content: Any = None
    reason: str = ""


class Hub:
    def __init__(self, environ: Mapping[str, str]) -> None:
        endpoint = (environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self.endpoint = endpoint if "://" in endpoint else f"https://{endpoint}"
        self.token = find_token(environ)
        self._answers: dict[str, HubAnswer] = {}
        self._lock = threading.Lock()

    def ask(self, path: str) -> HubAnswer:
        with self._lock:
            # Where one question got no answer, none will: the other checks do not wait for that.
            failure = next((answer for answer in self._answers.values() if not answer.status), None)
            if failure is None and path not in self._answers:
                # The timeout does not cover a name server that is silent, or an address for each of its lines.
                answer = try_bounded(PATIENCE + 1, lambda: self._ask_hub(path))
                self._answers[path] = answer or HubAnswer(0, reason=f"no answer in {PATIENCE + 1:g} s")
            return failure or self._answers[path]

    def whoami(self) -> HubAnswer:
        """Asks whether the hub is there, and what it thinks of our token, if we have one."""
        return self.ask("/api/whoami-v2")

    def ask_model(self, name: str, revision: str) -> HubAnswer:
        return self.ask(f"/api/models/{name}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true")

    def _ask_hub(self, path: str) -> HubAnswer:
        import httpx  # noqa: PLC0415  # it takes 0.2 s, for which the other checks need not wait

        from supervisor import asking  # noqa: PLC0415  # as above

        try:
            with asking.client(self.endpoint, PATIENCE, authorization=self.token and f"Bearer {self.token}") as client:
                answer = client.get(path, follow_redirects=True)
        except ValueError as error:
            return HubAnswer(0, reason=f"HF_ENDPOINT: {error}")
        except httpx.HTTPError as error:
            return HubAnswer(0, reason=asking.reason(error))
        content = None
        with contextlib.suppress(ValueError):
            content = answer.json()
        return HubAnswer(answer.status_code, content, answer.headers.get("X-Error-Message") or "")


def find_token(environ: Mapping[str, str]) -> str:
    """Returns the token that the hub's client would find; "" where there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if found := environ.get(name, "").strip():
            return found
    home = hub_cache({**environ, "HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": ""}).parent
    path = expand(environ.get("HF_TOKEN_PATH") or str(home / "token"), environ)
    return (try_bounded(PATIENCE, path.read_text) or "").strip()
