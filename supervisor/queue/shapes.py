"""Turns a job's input into HTTP requests. docs/jobs.md shows each shape of input and its result. Pure: no I/O."""

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

from supervisor.queue.jobs import JSON, JobError, encode_json, omit, parse_if_text, parse_object
from supervisor.queue.older_workers import FIELDS, MARKS, OWN_FIELDS, Batches, llm_fields, llm_result, rename, to_tokens

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEFAULT_MAX_TOKENS = 512  # by itself vLLM stops after 16, which no user of these shapes means
# The gateway answers these itself (gateway/app.py): its settings and its log are not the jobs', its feed has no end.
OWN_ROUTES = frozenset({"/ping", "/health", "/status", "/metrics", "/"})
HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.A)
HEADER_VALUE = re.compile(r"[\x20-\x7e\x80-\xff]*")
SAFE_CHARACTERS = "/?=&%+,:;@!$'()*~[]"  # these stay in a path or a query as they are, and so do escapes


class Request(NamedTuple):
    """A request goes to the gateway. Its `path` has the query; where `body` is None it has none."""

    method: str
    path: str
    headers: CIMultiDict[str]
    body: bytes | None = None


class Plan(NamedTuple):
    """A plan has one request, whose answer passes as it comes, or has its JSON changed by `reshape`. Or it has a batch
    of plans, each of which is to be read by itself. With `is_list` the result is a list of what came, as worker-vllm's
    users know it; else it is the object itself."""

    request: Request | None
    reshape: Callable[[JSON], JSON] | None = None
    batch: tuple[Callable[[], Plan], ...] = ()
    is_list: bool = True
    token_batches: Batches | None = None  # a stream is given in these batches of worker-vllm's


@dataclass(slots=True)
class Reader:
    """Reads inputs. `model` is put where a body names none. With `is_runpod_llm`, `messages` alone mean runpod-LLM's
    shape. `root` is vLLM's --root-path, below which a route is the same one."""

    model: str
    is_runpod_llm: bool = False
    root: str = ""
    max_len: int | None = None  # tokens that the model can take, once known
    token_batches: Batches | None = None  # the short shape's answers are worker-vllm's of old
    is_batch_item: bool = False  # its result is one in a list, where a stream has no place

    def read(self, content: object) -> Plan:
        """Returns the plan for an input. Raises JobError, which says what is wrong with the input."""
        try:
            return self._read_shape(content if isinstance(content, dict) else {})
        except RecursionError:
            raise JobError("The input is nested too deeply.") from None

    def _read_shape(self, content: JSON) -> Plan:
        if content.get("requests") is not None:
            return self._plan_batch(content["requests"])
        if content.get("openai_input") or content.get("openai_route"):
            body = parse_if_text(content.get("openai_input") or None, "openai_input")
            return Plan(self._build_request({"route": content.get("openai_route") or CHAT, "body": body}))
        if content.get("route"):
            return Plan(self._build_request(content))
        has_mark = any(content.get(mark) is not None for mark in MARKS)
        if not has_mark and "messages" not in content and "prompt" not in content:
            raise JobError(FIELDS["needs"]["any"])
        params = {**content, **parse_object(content.get("sampling_params"), "sampling_params")}
        if has_mark or (self.is_runpod_llm and "sampling_params" not in content):
            mode, fields = llm_fields(params)
            return Plan(self._build_generation(params, mode, fields), partial(llm_result, mode=mode), is_list=False)
        batches = self.token_batches and self.token_batches.override(params)
        fields = omit(params, OWN_FIELDS) | (FIELDS["counted"] if batches and params.get("stream") else {})
        is_chat = str(params.get("apply_chat_template")).lower() == "true" and isinstance(params.get("prompt"), str)
        request = self._build_generation(params, "chat" if is_chat else "short", fields)
        return Plan(request, to_tokens if batches else None, token_batches=batches)

    def _plan_batch(self, items: object) -> Plan:
        if self.is_batch_item:
            raise JobError("A batch can't hold another one.", param="requests")
        if not isinstance(items, list) or not items:
            raise JobError("requests must be a list with at least one request.", param="requests")
        reader = replace(self, is_runpod_llm=True, is_batch_item=True)
        return Plan(None, batch=tuple(partial(reader.read, item) for item in items), is_list=False)

    def _build_request(self, content: JSON) -> Request:
        body, headers = content.get("body"), _read_headers(content.get("headers"))
        data, content_type = None, None
        if content.get("files"):
            data, content_type = _form(parse_object(content["files"], "files"), self._fill(parse_object(body, "body")))
        elif isinstance(body, dict) and body.keys() == {"content_type", "base64"}:  # as binary results come out
            data, content_type = _decode_base64(body["base64"], "body"), body["content_type"]
        elif isinstance(body, str) and ("content-type" in headers or not body.lstrip().startswith("{")):
            data = body.encode("utf-8", "replace")
        elif body is not None:
            body = parse_if_text(body, "body")
            data = encode_json(rename(self._fill(body)) if isinstance(body, dict) else body)
            content_type = "application/json"
        if content_type is not None:
            headers["Content-Type"] = _header(content_type)
        method = content.get("method") or ("GET" if data is None else "POST")
        if not isinstance(method, str) or not (method.isascii() and method.isalpha()):
            raise JobError("method must be an HTTP method, such as POST.", param="method")
        return Request(method.upper(), self._build_path(content["route"], content.get("query")), headers, data)

    def _build_path(self, route: object, query: object) -> str:
        """Returns the path. Raises JobError where it is none, or one of the supervisor's own, however it is spelled."""
        if not isinstance(route, str) or not re.fullmatch(r"(?![^?]*://)[^\x00-\x20\x7f]+", route):
            raise JobError("The route must be a path, such as /v1/chat/completions.", param="route")
        path = re.sub(r"\A/?(openai/)?", "/", route)  # the endpoint's URL has `/openai`, too
        # The target is the path that is meant: without escapes, doubled slashes, dots, and a slash at its end.
        target, root = posixpath.normpath("/" + unquote(path.partition("?")[0]).lstrip("/")), self.root.rstrip("/")
        if root and (target == root or target.startswith(root + "/")):
            target = target[len(root) :] or "/"
        if target in OWN_ROUTES:
            text = f"{target} is the supervisor's own and not open to jobs. Ask for a route of the model's, such as "
            raise JobError(f"{text}/v1/models.", 403, param="route", code="route_not_open")
        if isinstance(query, dict):
            query = urlencode([row for row in query.items() if row[1] is not None], doseq=True, errors="surrogatepass")
        if not isinstance(query, str | None):
            raise JobError("query must be an object or text.", param="query")
        if query:
            path += ("&" if "?" in path else "?") + query.removeprefix("?")
        return quote(path, safe=SAFE_CHARACTERS, errors="surrogatepass")

    def _fill(self, body: JSON) -> JSON:
        if self.is_batch_item:
            body = omit(body, ("stream", "stream_options"))
        return body if body.get("model") else {**body, "model": self.model}

    def _build_generation(self, params: JSON, mode: str, body: JSON) -> Request:
        """Returns a chat or a completion, for both short shapes. A limit of null is none, and one beyond the model's
        means as many tokens as there is room for: vLLM takes its own length for that, and refuses more."""
        messages, prompt = params.get("messages"), params.get("prompt")
        if messages and mode != "complete":
            question = {"messages": messages}
        elif prompt is None:
            raise JobError(FIELDS["needs"][mode], param="prompt" if mode == "complete" else "messages")
        else:
            question = {"messages": [{"role": "user", "content": prompt}]} if mode == "chat" else {"prompt": prompt}
        if "prompt" in question and body.get("max_tokens") is None:
            body["max_tokens"] = DEFAULT_MAX_TOKENS
        for name in ("max_tokens", "max_completion_tokens"):
            if (limit := body.pop(name, None)) is not None:
                body[name] = min(limit, self.max_len or limit) if type(limit) is int else limit
        return self._build_request({"route": CHAT if "messages" in question else COMPLETIONS, "body": question | body})


def _read_headers(content: object) -> CIMultiDict[str]:
    pairs = {name: value for name, value in parse_object(content, "headers").items() if value is not None}
    for name in pairs:
        if not HEADER_NAME.fullmatch(name):
            raise JobError(f"{name!r} is no name of a header.", param="headers")
    return CIMultiDict({name: _header(value) for name, value in pairs.items() if name.lower() not in FIELDS["headers"]})


def _header(value: object) -> str:
    if not HEADER_VALUE.fullmatch(str(value)):
        raise JobError("A header has a character that HTTP does not allow.", param="headers")
    return str(value)


def _decode_base64(text: Any, name: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)  # programs break its lines
    except (TypeError, ValueError):
        raise JobError(f"{name} has no base64 that can be read.", param=name) from None


def _form(files: JSON, fields: JSON) -> tuple[bytes, str]:
    """Returns multipart/form-data for the audio routes. `files`: name -> {"base64", "filename"?, "content_type"?}."""
    from urllib3.filepost import encode_multipart_formdata  # noqa: PLC0415  # most jobs have no files

    files, fields = json.loads(encode_json([files, fields]))  # half of a surrogate pair has no place in a form either
    parts: list[Any] = [
        (name, item if isinstance(item, str) else json.dumps(item))
        for name, value in fields.items()
        for item in (value if isinstance(value, list) else [value])  # a form has no lists: the field comes again
        if item is not None
    ]
    for name, value in files.items():
        file = {"base64": value} if isinstance(value, str) else parse_object(value, f"files.{name}")
        content = _decode_base64(file.get("base64"), f"files.{name}")
        content_type = _header(file.get("content_type") or "application/octet-stream")
        parts.append((name, (str(file.get("filename") or name), content, content_type)))
    return encode_multipart_formdata(parts)
