"""A job's input -> the HTTP requests that it stands for. Pure: no I/O. docs/jobs.md shows each shape and its result."""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode

from multidict import CIMultiDict

from supervisor.queue.jobs import JSON, JobError, as_object, encoded, parsed, without
from supervisor.queue.older_workers import MARKS, TABLE, WORKERS, Batches, llm_fields, llm_result, renamed, tokens_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
COMPLETION_TOKENS = 512  # where nobody says otherwise vLLM stops after 16, which no user of these shapes means
# What the gateway answers itself (gateway/app.py): its settings and its log are not the jobs', and its feed has no end.
OWN_ROUTES = frozenset({"/ping", "/health", "/status", "/metrics", "/"})
HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.A)
HEADER_VALUE = re.compile(r"[\x20-\x7e\x80-\xff]*")
UNQUOTED = "/?=&%+,:;@!$'()*~[]"  # stands in a path or a query as it is, escapes among it


class Request(NamedTuple):
    """What goes to the gateway. `path` has its query; `body` None means none."""

    method: str
    path: str
    headers: CIMultiDict[str]
    body: bytes | None = None


class Job(NamedTuple):
    """One request, passed on as it comes; or, with `shape`, one whose JSON answer is reshaped; or a batch of these, to
    be read each by itself. `as_list`: the result is a list of what came, as worker-vllm's users know it; else it is the
    object itself."""

    request: Request | None
    shape: Callable[[JSON], JSON] | None = None
    batch: tuple[Callable[[], Job], ...] = ()
    as_list: bool = True
    tokens: Batches | None = None  # a stream is given in worker-vllm's batches


@dataclass(slots=True)
class Reader:
    """Reads inputs. `model` is put where a body names none; `llm`: `messages` alone means runpod-LLM's shape; `root`:
    vLLM's --root-path, below which a route is the same one; `longest`: tokens that the model can take, once known."""

    model: str
    llm: bool = False
    root: str = ""
    longest: int | None = None
    tokens: Batches | None = None  # the short shape's answers are worker-vllm's of old
    in_batch: bool = False  # each has a place in a list of results, where a stream has none

    def read(self, content: object) -> Job:
        """Raises JobError, which says what is wrong with the input."""
        try:
            return self._of_shape(content if isinstance(content, dict) else {})
        except RecursionError:
            raise JobError("The input is nested too deeply.") from None

    def _of_shape(self, content: JSON) -> Job:
        if content.get("requests") is not None:
            return self._batch(content["requests"])
        if content.get("openai_input") or content.get("openai_route"):
            body = parsed(content.get("openai_input") or None, "openai_input")
            return Job(self._request({"route": content.get("openai_route") or CHAT, "body": body}))
        if content.get("route"):
            return Job(self._request(content))
        marked = any(content.get(mark) is not None for mark in MARKS)
        if not marked and "messages" not in content and "prompt" not in content:
            raise JobError(TABLE["needs"]["any"])
        given = {**content, **as_object(content.get("sampling_params"), "sampling_params")}
        if marked or (self.llm and "sampling_params" not in content):
            mode, fields = llm_fields(given)
            return Job(self._generation(given, mode, fields), partial(llm_result, mode=mode), as_list=False)
        batches = self.tokens and self.tokens.of(given)
        fields = without(given, WORKERS) | (TABLE["counted"] if batches and given.get("stream") else {})
        chat = str(given.get("apply_chat_template")).lower() == "true" and isinstance(given.get("prompt"), str)
        request = self._generation(given, "chat" if chat else "short", fields)
        return Job(request, tokens_of if batches else None, tokens=batches)

    def _batch(self, items: object) -> Job:
        if self.in_batch:
            raise JobError("A batch can't hold another one.", param="requests")
        if not isinstance(items, list) or not items:
            raise JobError("requests must be a list with at least one request.", param="requests")
        reader = replace(self, llm=True, in_batch=True)
        return Job(None, batch=tuple(partial(reader.read, item) for item in items), as_list=False)

    def _request(self, content: JSON) -> Request:
        body, headers = content.get("body"), _headers(content.get("headers"))
        data, content_type = None, None
        if content.get("files"):
            data, content_type = _form(as_object(content["files"], "files"), self._filled(as_object(body, "body")))
        elif isinstance(body, dict) and body.keys() == {"content_type", "base64"}:  # as binary results come out
            data, content_type = _binary(body["base64"], "body"), body["content_type"]
        elif isinstance(body, str) and ("content-type" in headers or not body.lstrip().startswith("{")):
            data = body.encode("utf-8", "replace")
        elif body is not None:
            body = parsed(body, "body")
            data = encoded(renamed(self._filled(body)) if isinstance(body, dict) else body)
            content_type = "application/json"
        if content_type is not None:
            headers["Content-Type"] = _header(content_type)
        method = content.get("method") or ("GET" if data is None else "POST")
        if not isinstance(method, str) or not (method.isascii() and method.isalpha()):
            raise JobError("method must be an HTTP method, such as POST.", param="method")
        return Request(method.upper(), self._path(content["route"], content.get("query")), headers, data)

    def _path(self, route: object, query: object) -> str:
        """Raises JobError where it is none, or one of the supervisor's own, however it is spelled."""
        if not isinstance(route, str) or not re.fullmatch(r"(?![^?]*://)[^\x00-\x20\x7f]+", route):
            raise JobError("The route must be a path, such as /v1/chat/completions.", param="route")
        path = re.sub(r"\A/?(openai/)?", "/", route)  # `/openai`: as it is in the endpoint's URL
        # The one that is meant: without escapes, doubled slashes, dots, and a slash at its end.
        plain, root = posixpath.normpath("/" + unquote(path.partition("?")[0]).lstrip("/")), self.root.rstrip("/")
        if root and (plain == root or plain.startswith(root + "/")):
            plain = plain[len(root) :] or "/"
        if plain in OWN_ROUTES:
            text = f"{plain} is the supervisor's own and not open to jobs. Ask for a route of the model's, such as "
            raise JobError(f"{text}/v1/models.", 403, param="route", code="route_not_open")
        if isinstance(query, dict):
            query = urlencode(query, doseq=True, errors="surrogatepass")
        if not isinstance(query, str | None):
            raise JobError("query must be an object or text.", param="query")
        if query:
            path += ("&" if "?" in path else "?") + query.removeprefix("?")
        return quote(path, safe=UNQUOTED, errors="surrogatepass")

    def _filled(self, body: JSON) -> JSON:
        if self.in_batch:
            body = without(body, ("stream", "stream_options"))
        return body if body.get("model") else {**body, "model": self.model}

    def _generation(self, given: JSON, mode: str, body: JSON) -> Request:
        """A chat or a completion, of both short shapes. A limit of null is none, and one beyond the model's own means
        as many as there is room for: vLLM takes its own length for that, and refuses more."""
        messages, prompt = given.get("messages"), given.get("prompt")
        if messages and mode != "complete":
            asked = {"messages": messages}
        elif prompt is None:
            raise JobError(TABLE["needs"][mode], param="prompt" if mode == "complete" else "messages")
        else:
            asked = {"messages": [{"role": "user", "content": prompt}]} if mode == "chat" else {"prompt": prompt}
        if "prompt" in asked and body.get("max_tokens") is None:
            body["max_tokens"] = COMPLETION_TOKENS
        for name in ("max_tokens", "max_completion_tokens"):
            if (limit := body.pop(name, None)) is not None:
                body[name] = min(limit, self.longest or limit) if type(limit) is int else limit
        return self._request({"route": CHAT if "messages" in asked else COMPLETIONS, "body": asked | body})


def _headers(content: object) -> CIMultiDict[str]:
    given = as_object(content, "headers")
    for name in given:
        if not HEADER_NAME.fullmatch(name):
            raise JobError(f"{name!r} is no name of a header.", param="headers")
    return CIMultiDict({name: _header(value) for name, value in given.items() if name.lower() not in TABLE["headers"]})


def _header(value: object) -> str:
    if not HEADER_VALUE.fullmatch(str(value)):
        raise JobError("A header has a character that HTTP does not allow.", param="headers")
    return str(value)


def _binary(text: Any, name: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)  # programs break its lines
    except (TypeError, ValueError):
        raise JobError(f"{name} has no base64 that can be read.", param=name) from None


def _form(files: JSON, fields: JSON) -> tuple[bytes, str]:
    """multipart/form-data, as the audio routes want it. `files`: name -> {"base64", "filename"?, "content_type"?}."""
    from urllib3.filepost import encode_multipart_formdata  # noqa: PLC0415  # most jobs have no files

    files, fields = json.loads(encoded([files, fields]))  # half of a surrogate pair has no place in a form either
    parts: list[Any] = [
        (name, each if isinstance(each, str) else json.dumps(each))
        for name, value in fields.items()
        for each in (value if isinstance(value, list) else [value])  # a form has no lists: the field comes again
        if each is not None
    ]
    for name, given in files.items():
        file = {"base64": given} if isinstance(given, str) else as_object(given, f"files.{name}")
        content = _binary(file.get("base64"), f"files.{name}")
        kind = _header(file.get("content_type") or "application/octet-stream")
        parts.append((name, (str(file.get("filename") or name), content, kind)))
    return encode_multipart_formdata(parts)
