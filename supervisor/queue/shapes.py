"""RunPod jobs: an input -> the HTTP requests that it stands for; their answers -> the job's result. Pure: no I/O.

The shapes are those that users of worker-vllm and of runpod-LLM send; `docs/jobs.md` shows each with its result.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode

from supervisor.queue import old_fields, runpod_llm, tokens
from supervisor.queue.errors import JSON, JobError
from supervisor.queue.tokens import Batches

DEFAULT_ROUTE = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# vLLM stops a completion after 16 tokens where nobody says otherwise, which no user of these shapes means.
COMPLETION_TOKENS = 512
# What the gateway answers itself (gateway/app.py): its settings and its log are not the jobs', and its feed has no end.
OWN_ROUTES = frozenset({"/ping", "/health", "/status", "/metrics", "/"})
# The client's connection is not ours: what belongs to it does not go to vLLM. RunPod's key is no key of vLLM's.
OWN_HEADERS = frozenset(
    {
        "authorization", "connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization",
        "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
# Fields of the short shape that are for the worker and not for vLLM.
WORKER_FIELDS = frozenset({"messages", "prompt", "sampling_params", "apply_chat_template", *old_fields.BATCHES})
LIMITS = ("max_tokens", "max_completion_tokens")
# Each event of a stream tells how many tokens there are so far.
COUNTED: JSON = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
SHAPES = "openai_route, route, messages, prompt, mode, requests"


class Request(NamedTuple):
    """What goes to the gateway. `path` has its query; `body` None means none."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One request, passed on as it comes; or, with `shape`, one whose JSON answer is reshaped; or a batch of these.

    `as_list`: the result is a list of what came, as worker-vllm's users know it; else it is the object itself.
    """

    request: Request | None
    shape: Callable[[JSON], JSON] | None = None
    batch: tuple[Job | JobError, ...] = ()
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

    def read(self, content: object) -> Job:
        """Raises JobError, which says what is wrong with the input."""
        if not isinstance(content, dict) or not content:
            raise JobError(f"The job's input must be an object with one of: {SHAPES}.")
        if content.get("requests") is not None:
            return self._batch(content["requests"])
        return self._single(content, self.llm)

    def _batch(self, items: object) -> Job:
        if not isinstance(items, list) or not items:
            raise JobError("requests must be a list with at least one request.", param="requests")

        def read(item: object) -> Job | JobError:
            if not isinstance(item, dict):
                return JobError("Each of requests must be an object.", param="requests")
            if item.get("requests") is not None:
                return JobError("A batch can't hold another one.", param="requests")
            try:
                return self._single(_unstreamed(item), llm=True)
            except JobError as error:
                return error

        return Job(None, batch=tuple(map(read, items)), as_list=False)

    def _single(self, content: JSON, llm: bool) -> Job:
        try:
            return self._of_shape(content, llm)
        except RecursionError:
            raise JobError("The input is nested too deeply.") from None

    def _of_shape(self, content: JSON, llm: bool) -> Job:
        if content.get("openai_input"):
            route = content.get("openai_route") or DEFAULT_ROUTE
            return Job(self._request("POST", route, self._json_body(content["openai_input"], "openai_input")))
        if content.get("openai_route"):
            return Job(self._request("GET", content["openai_route"]))
        if content.get("route"):
            return Job(self._route(content))
        marked = any(content.get(mark) is not None for mark in runpod_llm.MARKS)
        if "messages" not in content and "prompt" not in content and not marked:
            raise JobError(f"The job's input has none of: {SHAPES}.")
        if marked or (llm and "sampling_params" not in content):
            return self._llm(content)
        if self.tokens is None:
            return Job(self._short(content))
        batches = self.tokens.of(content)
        return Job(self._short({**content, **COUNTED} if _streams(content) else content), tokens.whole, tokens=batches)

    # Any route

    def _route(self, content: JSON) -> Request:
        body, headers = content.get("body"), _headers(content.get("headers"))
        if content.get("files"):
            if not isinstance(body, dict | None):
                raise JobError("Beside files, body must be an object.", param="body")
            form, form_type = _form(content["files"], self._with_model(body or {}))
            data: bytes | None = form
            headers = (*_without(headers, "content-type"), ("Content-Type", form_type))
        elif isinstance(body, dict) and body.keys() == {"content_type", "base64"}:  # as binary results come out
            data = _binary(body["base64"], "body")
            headers = (*_without(headers, "content-type"), ("Content-Type", _header(body["content_type"])))
        elif body is None:
            data = None
        elif isinstance(body, str) and (_typed(headers) or not body.lstrip().startswith("{")):
            data = body.encode("utf-8", "replace")
        else:
            data = self._json_body(body, "body")
            headers = (*_without(headers, "content-type"), ("Content-Type", "application/json"))
        method = content.get("method") or ("GET" if data is None else "POST")
        if not isinstance(method, str) or not (method.isascii() and method.isalpha()):
            raise JobError("method must be an HTTP method, such as POST.", param="method")
        path = self._open(_path(content["route"]))
        if query := _query(content.get("query")):
            path += ("&" if "?" in path else "?") + query
        return Request(method.upper(), path, headers, data)

    def _request(self, method: str, route: object, body: bytes | None = None) -> Request:
        path = self._open(_path(route))
        return Request(method, path, (("Content-Type", "application/json"),) if body is not None else (), body)

    def _open(self, path: str) -> str:
        """The path as it is. Raises JobError where it is one of the supervisor's own, however it is spelled."""
        plain, root = _plain(path.partition("?")[0]), self.root.rstrip("/")
        if root and (plain == root or plain.startswith(root + "/")):
            plain = plain[len(root) :] or "/"
        if plain in OWN_ROUTES:
            raise JobError(
                f"{plain} is the supervisor's own and not open to jobs. Ask for a route of the model's, such as "
                "/v1/models.",
                403,
                "permission_error",
                "route",
                "route_not_open",
            )
        return path

    def _json_body(self, content: object, name: str) -> bytes:
        if isinstance(content, str):  # some clients encode it twice
            try:
                content = json.loads(content)
            except ValueError as error:
                raise JobError(f"{name} is text that is no JSON ({error}).", param=name) from None
        if isinstance(content, dict):
            content = old_fields.renamed(self._with_model(content))
        # Half of a surrogate pair, of an emoji that a client cut: vLLM's tokenizer would take offence.
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")

    def _with_model(self, body: JSON) -> JSON:
        return body if body.get("model") else {**body, "model": self.model}

    # The short shapes of both

    def _short(self, content: JSON) -> Request:
        """worker-vllm's."""
        beside = {name: value for name, value in content.items() if name not in WORKER_FIELDS}
        body = self._within_the_model({**beside, **_sampling(content)})
        messages, prompt = content.get("messages"), content.get("prompt")
        as_chat = str(content.get("apply_chat_template")).lower() == "true"
        if not messages and isinstance(prompt, str) and as_chat:
            messages = [{"role": "user", "content": prompt}]
        if messages:
            return self._request("POST", DEFAULT_ROUTE, self._json_body({"messages": messages, **body}, "input"))
        if prompt is None:
            raise JobError("messages is empty, and there is no prompt.", param="messages")
        body.setdefault("max_tokens", self._completion_tokens)
        return self._request("POST", COMPLETIONS, self._json_body({"prompt": prompt, **body}, "input"))

    def _llm(self, content: JSON) -> Job:
        mode, body = runpod_llm.body(content, _sampling(content))
        body = self._within_the_model({"max_tokens": self._completion_tokens, **body})
        route = DEFAULT_ROUTE if "messages" in body else COMPLETIONS
        request = self._request("POST", route, self._json_body(body, "input"))
        return Job(request, shape=lambda answer: runpod_llm.result(answer, mode), as_list=False)

    @property
    def _completion_tokens(self) -> int:
        """What nobody asked for must not be more than the model can take."""
        return min(COMPLETION_TOKENS, self.longest or COMPLETION_TOKENS)

    def _within_the_model(self, body: JSON) -> JSON:
        """A limit of null is none, and one beyond the model's own means as many as there is room for: vLLM takes its
        own length for that, and refuses more."""
        for name in LIMITS:
            limit = body.get(name)
            if limit is None:
                body.pop(name, None)
            elif type(limit) is int and self.longest is not None and limit > self.longest:
                body[name] = self.longest
        return body


def _unstreamed(item: JSON) -> JSON:
    """A stream has no place in a batch's list of results: one object for each item."""
    whole = {name: value for name, value in item.items() if name not in ("stream", "stream_options")}
    for name in ("openai_input", "body", "sampling_params"):
        inner = whole.get(name)
        if isinstance(inner, str) and '"stream' in inner:
            with contextlib.suppress(ValueError, RecursionError):  # what is wrong with it is said by who needs it
                inner = json.loads(inner)
        if isinstance(inner, dict) and "stream" in inner:
            rest = {name: value for name, value in inner.items() if name != "stream_options"}
            whole[name] = {**rest, "stream": False}
    return whole


def _streams(content: JSON) -> bool:
    return bool({**content, **_sampling(content)}.get("stream"))


def _sampling(content: JSON) -> JSON:
    sampling = content.get("sampling_params") or {}
    if isinstance(sampling, str):  # as openai_input may be
        with contextlib.suppress(ValueError, RecursionError):
            sampling = json.loads(sampling)
    if not isinstance(sampling, dict):
        raise JobError("sampling_params must be an object.", param="sampling_params")
    return sampling


def batch_result(model: str, results: list[object]) -> JSON:
    return {"model": model, "count": len(results), "results": results}


# Pieces of requests


def _path(route: object) -> str:
    if (
        not isinstance(route, str)
        or "://" in route.partition("?")[0]
        or any(ord(c) <= 32 or ord(c) == 127 for c in route)
    ):
        raise JobError("The route must be a path, such as /v1/chat/completions.", param="route")
    path = route if route.startswith("/") else f"/{route}"
    if path.startswith("/openai/"):  # as it is in the endpoint's URL
        path = path.removeprefix("/openai")
    return quote(path, safe="/?=&%+,:;@!$'()*~-._[]", errors="surrogatepass")


def _plain(path: str) -> str:
    """The path that is meant: without escapes, doubled slashes, dots, and a slash at its end."""
    return posixpath.normpath("/" + unquote(path).lstrip("/"))


def _query(content: object) -> str:
    if not content:
        return ""
    if isinstance(content, dict):
        return urlencode(content, doseq=True, errors="surrogatepass")
    if not isinstance(content, str):
        raise JobError("query must be an object or text.", param="query")
    return quote(content.removeprefix("?"), safe="=&%+,:/?@!$'()*;~", errors="surrogatepass")


def _header(value: object) -> str:
    text = str(value)
    if any(ord(c) < 32 or ord(c) > 255 or ord(c) == 127 for c in text):
        raise JobError("A header has a character that HTTP does not allow.", param="headers")
    return text


def _headers(content: object) -> tuple[tuple[str, str], ...]:
    if content is None:
        return ()
    if not isinstance(content, dict):
        raise JobError("headers must be an object.", param="headers")
    found = []
    for name, value in content.items():
        if not name or not all(c.isascii() and (c.isalnum() or c in "-_.!#$%&'*+^`|~") for c in name):
            raise JobError(f"{name!r} is no name of a header.", param="headers")
        if name.lower() not in OWN_HEADERS:
            found.append((name, _header(value)))
    return tuple(found)


def _typed(headers: tuple[tuple[str, str], ...]) -> bool:
    return any(name.lower() == "content-type" for name, _ in headers)


def _without(headers: tuple[tuple[str, str], ...], name: str) -> tuple[tuple[str, str], ...]:
    return tuple(header for header in headers if header[0].lower() != name)


def _binary(text: object, name: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise TypeError
        return base64.b64decode("".join(text.split()), validate=True)  # programs break its lines
    except (TypeError, ValueError, binascii.Error):
        raise JobError(f"{name} has base64 that is none.", param=name) from None


def _form(files: object, fields: Mapping[str, Any]) -> tuple[bytes, str]:
    """multipart/form-data, as the audio routes want it. `files`: name -> {"base64", "filename"?, "content_type"?}."""
    from urllib3.filepost import encode_multipart_formdata  # noqa: PLC0415  # most jobs have no files

    if not isinstance(files, dict):
        raise JobError('files must be an object: {"file": {"base64": ..., "filename": ...}}.', param="files")
    parts: list[Any] = []
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:  # a form has no lists: the field comes again
            if each is not None:
                parts.append((_utf8(name), _utf8(each if isinstance(each, str) else json.dumps(each))))
    for name, given in files.items():
        file = {"base64": given} if isinstance(given, str) else given
        if not isinstance(file, dict) or "base64" not in file:
            raise JobError(f"files.{name} needs base64.", param="files")
        data = _binary(file["base64"], f"files.{name}")
        kind = _header(file.get("content_type") or "application/octet-stream")
        parts.append((_utf8(name), (_utf8(str(file.get("filename") or name)), data, kind)))
    body, content_type = encode_multipart_formdata(parts)
    return body, content_type


def _utf8(text: str) -> str:
    """Without lone surrogates, which JSON can carry and a form can't."""
    return text.encode("utf-8", "replace").decode()
