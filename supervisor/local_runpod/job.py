"""`supervisor job`: one job for a supervisor in queue mode, by the simulated RunPod, as a client of RunPod sends it.

By /run and /stream, not by /runsync: so the job's id is known from the first moment on, and Ctrl-C can cancel it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from supervisor import asking, secrets, status

PATIENCE = 30.0  # seconds for an answer; /stream waits up to one for news
FAILED = 1
WAITING = ("IN_QUEUE", "IN_PROGRESS")
START = "start one with `supervisor up MODEL --mode queue`"
KEYS = ("SUPERVISOR_API_KEYS", "SUPERVISOR_ADMIN_KEYS")  # the simulated RunPod asks for one of these, too
# Where an input says whether the answer is to stream: the first of these that it has, else the input itself.
BODIES = ("openai_input", "body")


class JobError(Exception):
    """It can't be sent, or failed; the text says why."""


def run(given: str, url: str | None, environ: Mapping[str, str], *, stream: bool) -> int:
    """Prints the result. 0 where the job is completed, else 1; Ctrl-C cancels it."""
    try:
        job = read(given)
        if stream:
            job["input"] = streaming(job["input"])
        return _run(Endpoint(url or find(environ), status.authorization(environ, *KEYS)), job, stream=stream)
    except (JobError, status.StatusError) as error:
        secrets.complain(str(error), environ)
        return FAILED


def read(given: str) -> dict[str, Any]:
    """A job, from JSON itself, a file, or standard input. What has no `input` is taken for one."""
    text = given
    try:
        if given == "-":
            text = sys.stdin.read()
        elif not given.lstrip().startswith(("{", "[")):
            text = Path(given).read_text()
        job = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise JobError(f"{given} can't be read ({why}): expected a file, JSON, or - for standard input") from None
    except (ValueError, RecursionError) as error:
        raise JobError(f"the job is not JSON: {error}") from None
    if not isinstance(job, dict):
        raise JobError('the job must be an object, such as {"input": {"prompt": "Once upon"}} (docs/jobs.md)')
    return job if "input" in job else {"input": job}


def streaming(content: Any) -> Any:
    """The same input, asking for a stream where it does not say."""
    if not isinstance(content, dict):
        return content
    for name in BODIES:
        if isinstance(content.get(name), dict):
            return {**content, name: {"stream": True, **content[name]}}
    return {"stream": True, **content} if "messages" in content or "prompt" in content else content


def find(environ: Mapping[str, str]) -> str:
    """The address of the simulated RunPod of the supervisor that runs here."""
    silent: list[str] = []
    found = list(status.here(environ, silent))
    urls = [str(each["simulator"]) for each in found if each.get("simulator")]
    if urls:
        return urls[0]
    if any(each.get("mode") == "queue" for each in found):
        raise JobError("the supervisor here takes its jobs from RunPod: send it there, or name an endpoint with --url")
    if found:
        raise JobError(f"the supervisor here serves HTTP, and takes no jobs: {START}")
    raise JobError("; ".join(silent) or f"no supervisor runs here: {START}, or name one with --url")


class Endpoint:
    """`http://127.0.0.1:8000`, or with the path of an endpoint, `/v2/local`."""

    def __init__(self, url: str, authorization: str = "") -> None:
        self.url = url
        try:
            self.client = asking.client(url, PATIENCE, authorization=authorization)
        except ValueError:
            raise JobError(f"--url {url}: expected an address such as http://127.0.0.1:8000") from None
        if self.client.base_url.path == "/":
            self.client.base_url = self.client.base_url.join("/v2/local")

    def ask(self, method: str, path: str, content: str | None = None) -> dict[str, Any]:
        """The answer's object. Raises JobError where there is none."""
        try:
            answer = self.client.request(method, path, content=content)
        except httpx.HTTPError as error:
            raise JobError(f"{self.url} does not answer ({asking.why(error)})") from None
        found: Any = None
        with contextlib.suppress(ValueError):
            found = answer.json()
        if answer.status_code == 200 and isinstance(found, dict):
            return found
        why = found.get("error") if isinstance(found, dict) else None
        if answer.status_code == 401:
            raise JobError(f"{self.url} asks for a key: set SUPERVISOR_API_KEYS to one of its keys")
        if answer.status_code in (403, 404) and not isinstance(why, str):
            raise JobError(f"{self.url} is no queue's endpoint (status {answer.status_code}): {START}")
        raise JobError(f"{self.url} refuses it (status {answer.status_code}): {readable(why)}")


def _run(endpoint: Endpoint, job: Mapping[str, Any], *, stream: bool) -> int:
    where, pressed = str(endpoint.ask("POST", "/run", json.dumps(job)).get("id")), list[int]()

    def interrupted(number: int, _: object) -> None:
        # Seen after each answer, within a second: raised at once, it once hung in the HTTP client's locks.
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    try:
        return _follow(endpoint, where, pressed, stream=stream)
    except KeyboardInterrupt:
        if is_patient := len(pressed) == 1:
            endpoint.ask("POST", f"/cancel/{where}")
        print(f"supervisor: the job was {'' if is_patient else 'not '}cancelled", file=sys.stderr)
        raise


def _follow(endpoint: Endpoint, where: str, pressed: Sequence[int], *, stream: bool) -> int:
    """Reads its chunks until it is over; /stream answers when there is news."""
    text = Text()
    news: dict[str, Any] = {"status": "IN_QUEUE"}
    while news.get("status") in WAITING or news.get("stream"):
        if pressed:
            raise KeyboardInterrupt
        news = endpoint.ask("GET", f"/stream/{where}")
        for chunk in news.get("stream") or ():
            if stream:
                text.take(chunk.get("output"))
    result = endpoint.ask("GET", f"/status/{where}")
    if stream and text.written:
        print(flush=True)
    if result.get("status") != "COMPLETED" or text.error:
        said = text.error or result.get("error") or f"it is {result.get('status')}"
        print(f"supervisor: the job failed: {readable(said)}", file=sys.stderr)
        return FAILED
    if not text.written:
        print(json.dumps(result.get("output"), ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))
    return 0


class Text:
    """Writes what the chunks of an event stream say, as they come."""

    def __init__(self) -> None:
        self.written = False
        self.error: object = None
        self.rest = ""

    def take(self, chunk: object) -> None:
        if not isinstance(chunk, str):
            return  # a whole answer: it is in the result
        *lines, self.rest = (self.rest + chunk).split("\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # no data, or [DONE]
                event = json.loads(line.removeprefix("data:"))
                if isinstance(event, dict):
                    self._event(event)

    def _event(self, event: Mapping[str, Any]) -> None:
        """Of OpenAI's chats, completions and responses, and of Anthropic's messages."""
        self.error = event.get("error") or self.error
        choices = event.get("choices") or ()
        for said in (event.get("delta"), *(choice.get("text") or choice.get("delta") for choice in choices)):
            text = said.get("content") or said.get("text") if isinstance(said, dict) else said
            if isinstance(text, str) and text:
                self.written = True
                print(text, end="", flush=True)


def readable(error: object) -> str:
    """The message of an error, which may be an object, or its JSON as text (docs/jobs.md)."""
    found = error
    if isinstance(error, str):
        with contextlib.suppress(ValueError):
            found = json.loads(error)
    if not isinstance(found, dict):
        return str(error or "it does not say why")
    message = found.get("message") or found.get("error_message") or json.dumps(found)
    status_code = found.get("status") or found.get("code")
    return f"{message} (status {status_code})" if status_code else str(message)
