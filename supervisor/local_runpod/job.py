"""`supervisor job` sends a job to a supervisor in queue mode, by the simulated RunPod, as a client of RunPod sends it.

It uses /run and /stream, not /runsync: so the job's id is known from the first moment on, and Ctrl-C can cancel it.
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

ANSWER_TIMEOUT = 30.0  # seconds for an answer; /stream waits up to one for news
OPEN_STATES = ("IN_QUEUE", "IN_PROGRESS")
START_HINT = "start one with `supervisor up MODEL --mode queue`"
KEYS = ("SUPERVISOR_API_KEYS", "SUPERVISOR_ADMIN_KEYS")  # the simulated RunPod asks for one of these, too
# The first of these that an input has says whether the answer is to stream, else the input itself does.
BODY_FIELDS = ("openai_input", "body")


class SendError(Exception):
    """The job can't be sent, or failed; the text says why."""


def run(source: str, url: str | None, environ: Mapping[str, str], *, stream: bool) -> int:
    """Sends the job and prints its result. Returns 0 where it is completed, else 1. Who does not wait cancels it."""
    try:
        job = read_job(source)
        if stream:
            job["input"] = add_stream(job["input"])
        return _send_job(Endpoint(url or find_url(environ), status.authorization(environ, *KEYS)), job, stream=stream)
    except (SendError, status.StatusError) as error:
        secrets.complain(str(error), environ)
        return 1


def read_job(source: str) -> dict[str, Any]:
    """Reads a job from JSON itself, a file, or standard input. What has no `input` is taken for one."""
    text = source
    try:
        if source == "-":
            text = sys.stdin.read()
        elif not source.lstrip().startswith(("{", "[")):
            text = Path(source).read_text()
        job = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SendError(f"{source} can't be read ({reason}): expected a file, JSON, or - for standard input") from None
    except (ValueError, RecursionError) as error:
        raise SendError(f"the job is not JSON: {error}") from None
    if not isinstance(job, dict):
        raise SendError('the job must be an object, such as {"input": {"prompt": "Once upon"}} (docs/jobs.md)')
    return job if "input" in job else {"input": job}


def add_stream(content: Any) -> Any:
    """Returns the same input, which asks for a stream where it said nothing about it."""
    if not isinstance(content, dict):
        return content
    for name in BODY_FIELDS:
        if isinstance(content.get(name), dict):
            return {**content, name: {"stream": True, **content[name]}}
    return {"stream": True, **content} if "messages" in content or "prompt" in content else content


def find_url(environ: Mapping[str, str]) -> str:
    """Returns the address of the simulated RunPod of the supervisor that runs here. Raises SendError without one."""
    complaints: list[str] = []
    supervisors = list(status.ask_local(environ, complaints))
    urls = [str(supervisor["simulator"]) for supervisor in supervisors if supervisor.get("simulator")]
    if urls:
        return urls[0]
    if any(supervisor.get("mode") == "queue" for supervisor in supervisors):
        raise SendError("the supervisor here takes its jobs from RunPod: send it there, or name an endpoint with --url")
    if supervisors:
        raise SendError(f"the supervisor here serves HTTP, and takes no jobs: {START_HINT}")
    raise SendError("; ".join(complaints) or f"no supervisor runs here: {START_HINT}, or name one with --url")


class Endpoint:
    """Asks an endpoint at `http://127.0.0.1:8000`, or at an address with an endpoint's path, `/v2/local`."""

    def __init__(self, url: str, authorization: str = "") -> None:
        self.url = url
        try:
            self.client = asking.client(url, ANSWER_TIMEOUT, authorization=authorization)
        except ValueError:
            raise SendError(f"--url {url}: expected an address such as http://127.0.0.1:8000") from None
        if self.client.base_url.path == "/":
            self.client.base_url = self.client.base_url.join("/v2/local")

    def ask(self, method: str, path: str, content: str | None = None) -> dict[str, Any]:
        """Returns the answer's object. Raises SendError where there is none."""
        try:
            response = self.client.request(method, path, content=content)
        except httpx.HTTPError as error:
            raise SendError(f"{self.url} does not answer ({asking.reason(error)})") from None
        answer: Any = None
        with contextlib.suppress(ValueError):
            answer = response.json()
        if response.status_code == 200 and isinstance(answer, dict):
            return answer
        reason = answer.get("error") if isinstance(answer, dict) else None
        if response.status_code == 401:
            raise SendError(f"{self.url} asks for a key: set SUPERVISOR_API_KEYS to one of its keys")
        if response.status_code in (403, 404) and not isinstance(reason, str):
            raise SendError(f"{self.url} is no queue's endpoint (status {response.status_code}): {START_HINT}")
        raise SendError(f"{self.url} refuses it (status {response.status_code}): {describe_error(reason)}")


def _send_job(endpoint: Endpoint, job: Mapping[str, Any], *, stream: bool) -> int:
    job_id, interrupts = str(endpoint.ask("POST", "/run", json.dumps(job)).get("id")), list[int]()

    def note_interrupt(number: int, _: object) -> None:
        # It is looked at after each answer, within a second: raised at once, it once hung in the HTTP client's locks.
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_interrupt)
    try:
        return _follow(endpoint, job_id, interrupts, stream=stream)
    except (KeyboardInterrupt, BrokenPipeError):  # the latter where nobody reads what it prints
        if can_cancel := len(interrupts) < 2 and endpoint.ask("GET", f"/status/{job_id}").get("status") in OPEN_STATES:
            endpoint.ask("POST", f"/cancel/{job_id}")
        print(f"supervisor: the job was {'' if can_cancel else 'not '}cancelled", file=sys.stderr)
        raise


def _follow(endpoint: Endpoint, job_id: str, interrupts: Sequence[int], *, stream: bool) -> int:
    """Reads the job's chunks until it is over, and prints its result. Raises SendError where it failed."""
    printer = StreamPrinter()
    news: dict[str, Any] = {"status": "IN_QUEUE"}
    while news.get("status") in OPEN_STATES or news.get("stream"):
        if interrupts:
            raise KeyboardInterrupt
        news = endpoint.ask("GET", f"/stream/{job_id}")  # it answers when there is news
        for chunk in news.get("stream") or ():
            if stream:
                printer.print_chunk(chunk.get("output"))
    result = endpoint.ask("GET", f"/status/{job_id}")
    if stream and printer.has_written:
        print(flush=True)
    if result.get("status") != "COMPLETED" or printer.error:
        error = printer.error or result.get("error") or f"it is {result.get('status')}"
        raise SendError(f"the job failed: {describe_error(error)}")
    if not printer.has_written:
        print(json.dumps(result.get("output"), ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))
    return 0


class StreamPrinter:
    """Prints what the chunks of an event stream say, as they come."""

    def __init__(self) -> None:
        self.has_written = False
        self.error: object = None
        self.partial_line = ""

    def print_chunk(self, chunk: object) -> None:
        if not isinstance(chunk, str):
            return  # a whole answer: it is in the result
        *lines, self.partial_line = (self.partial_line + chunk).split("\n")
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # no data, or [DONE]
                event = json.loads(line.removeprefix("data:"))
                if isinstance(event, dict):
                    self._print_event(event)

    def _print_event(self, event: Mapping[str, Any]) -> None:
        """Prints the text of an event: of OpenAI's chats, completions and responses, and of Anthropic's messages."""
        self.error = event.get("error") or self.error
        choices = event.get("choices") or ()
        for part in (event.get("delta"), *(choice.get("text") or choice.get("delta") for choice in choices)):
            text = part.get("content") or part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str) and text:
                self.has_written = True
                print(text, end="", flush=True)


def describe_error(error: object) -> str:
    """Returns the message of an error, which may be an object, or its JSON as text (docs/jobs.md)."""
    content = error
    if isinstance(error, str):
        with contextlib.suppress(ValueError):
            content = json.loads(error)
    if not isinstance(content, dict):
        return str(error or "it does not say why")
    message = content.get("message") or content.get("error_message") or json.dumps(content)
    status_code = content.get("status") or content.get("code")
    return f"{message} (status {status_code})" if status_code else str(message)
