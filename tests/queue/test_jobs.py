"""Every shape of input, and the request or the error that it becomes; and answers, and what becomes of them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request as HttpRequest

from supervisor.gateway.app import OWN_PATHS
from supervisor.queue.jobs import JobError
from supervisor.queue.older_workers import llm_result
from supervisor.queue.shapes import OWN_ROUTES, Plan, Reader, Request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
DEEP = "[" * 200_000
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
BINARY = {"content_type": "audio/wav", "base64": base64.b64encode(b"\x00\xff\r\n").decode()}

NO_STREAM = {"n": 2, "model": "demo"}

READER = Reader("demo")
LLM_READER = Reader("demo", is_runpod_llm=True)
JSON_TYPE = {"Content-Type": "application/json"}


class Case(NamedTuple):
    """An input and its request; `body` None: without one."""

    name: str
    input: dict[str, Any]
    path: str
    body: object
    method: str = "POST"


def ours(**body: object) -> dict[str, object]:
    """A body with the model that is filled in."""
    return {**body, "model": "demo"}


def cases(*rows: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", rows, ids=[row.name for row in rows])


def one(content: object, reader: Reader = READER) -> Request:
    """The request of an input that is not a batch."""
    job = reader.read(content)
    assert job.request is not None
    assert job.batch == ()
    return job.request


def parts(request: Request) -> tuple[str, str, dict[str, str], bytes | None]:
    return request.method, request.path, dict(request.headers), request.body


def body_of(request: Request) -> Any:
    return None if request.body is None else json.loads(request.body)


def check(case: Case, reader: Reader) -> Plan:
    job = reader.read(case.input)
    assert job.request is not None
    assert job.batch == ()
    assert (job.request.method, job.request.path) == (case.method, case.path)
    assert body_of(job.request) == case.body
    assert dict(job.request.headers) == (JSON_TYPE if case.body is not None else {})
    return job


def items_of(reader: Reader, *items: object) -> list[Plan | JobError]:
    """What is read of each of a batch."""
    job = reader.read({"requests": [*items]})
    assert job.request is None
    assert not job.is_list
    assert len(job.batch) == len(items)
    found: list[Plan | JobError] = []
    for read in job.batch:
        try:
            found.append(read())
        except JobError as error:
            found.append(error)
    return found


def refusal(content: object, reader: Reader = READER) -> JobError:
    with pytest.raises(JobError) as caught:
        reader.read(content)
    assert (caught.value.status, caught.value.kind) == (400, "invalid_request_error")
    return caught.value


# openai_route, openai_input


@cases(
    Case(
        "its-model-is-kept",
        {"openai_route": COMPLETIONS, "openai_input": {"model": "mine", "prompt": "a", "n": 2}},
        COMPLETIONS,
        {"model": "mine", "prompt": "a", "n": 2},
    ),
    Case("no-route-is-chat", {"openai_input": {"messages": HI}}, CHAT, ours(messages=HI)),
    Case("no-model", {"openai_input": {"messages": HI}}, CHAT, ours(messages=HI)),
    Case("an-empty-model", {"openai_input": {"messages": HI, "model": ""}}, CHAT, ours(messages=HI)),
    Case("model-null", {"openai_input": {"messages": HI, "model": None}}, CHAT, ours(messages=HI)),
    Case(
        "the-url-s-prefix",
        {"openai_route": "/openai/v1/responses", "openai_input": {"input": "hi"}},
        "/v1/responses",
        ours(input="hi"),
    ),
    Case("no-slash-in-front", {"openai_route": "v1/messages", "openai_input": {"a": 1}}, "/v1/messages", ours(a=1)),
    Case("prefix-without-slash", {"openai_route": "openai/v1/models"}, "/v1/models", None, "GET"),
    Case("a-name-that-begins-so", {"openai_route": "/openai-like"}, "/openai-like", None, "GET"),
    Case("json-text", {"openai_input": json.dumps({"messages": HI})}, CHAT, ours(messages=HI)),
    Case("no-object", {"openai_route": "/classify", "openai_input": [1, 2]}, "/classify", [1, 2]),
    Case("no-input-is-get", {"openai_route": "/v1/models"}, "/v1/models", None, "GET"),
    Case("empty-input-is-get", {"openai_route": "/v1/models", "openai_input": {}}, "/v1/models", None, "GET"),
    Case("null-input-is-get", {"openai_route": "/v1/models", "openai_input": None}, "/v1/models", None, "GET"),
    Case("empty-text-is-get", {"openai_route": "/v1/models", "openai_input": ""}, "/v1/models", None, "GET"),
    Case(
        "it-comes-before-all-others",
        {"openai_input": {"prompt": "a"}, "route": "/x", "messages": HI, "mode": "json", "sampling_params": {"n": 2}},
        CHAT,
        ours(prompt="a"),
    ),
    Case(
        "nothing-of-ours-is-filled-in",
        {"openai_route": COMPLETIONS, "openai_input": {"prompt": "a"}},
        COMPLETIONS,
        ours(prompt="a"),
    ),
    Case(
        "half-a-surrogate-pair",
        {"openai_input": {"messages": [{"role": "user", "content": "\ud83d"}]}},
        CHAT,
        {"messages": [{"role": "user", "content": "?"}], "model": "demo"},
    ),
)
@pytest.mark.parametrize("reader", [READER, LLM_READER], ids=["", "llm"])
def test_openai(case: Case, reader: Reader) -> None:
    job = check(case, reader)
    assert job.is_list
    assert job.reshape is None


# route


@cases(
    Case("nothing-else-is-get", {"route": "/version"}, "/version", None, "GET"),
    Case("below-one-of-ours", {"route": "/metrics/x"}, "/metrics/x", None, "GET"),
    Case("one-of-ours-in-the-query", {"route": "/x?y=/status"}, "/x?y=/status", None, "GET"),
    Case("one-of-ours-in-other-capitals", {"route": "/Status"}, "/Status", None, "GET"),
    Case("a-body-is-post", {"route": "/tokenize", "body": {"prompt": "a"}}, "/tokenize", ours(prompt="a")),
    Case("its-model", {"route": "/x", "body": {"model": "mine"}}, "/x", {"model": "mine"}),
    Case("an-empty-body", {"route": "/x", "body": {}}, "/x", {"model": "demo"}),
    Case("a-list", {"route": "/x", "body": [{"a": 1}]}, "/x", [{"a": 1}]),
    Case("a-number", {"route": "/x", "body": 0}, "/x", 0),
    Case("json-text", {"route": "/x", "body": ' {"a": 1}'}, "/x", ours(a=1)),
    Case("method", {"route": "/x", "method": "delete"}, "/x", None, "DELETE"),
    Case("method-and-body", {"route": "/x", "method": "PUT", "body": {"a": 1}}, "/x", ours(a=1), "PUT"),
    Case("post-without-a-body", {"route": "/x", "method": "POST"}, "/x", None),
    Case("prefix", {"route": "/openai/v1/models"}, "/v1/models", None, "GET"),
    Case("no-slash", {"route": "v1/models"}, "/v1/models", None, "GET"),
    Case("query-in-the-route", {"route": "/x?a=1&b=%20"}, "/x?a=1&b=%20", None, "GET"),
    Case("a-url-in-the-query", {"route": "/x?u=http://h/"}, "/x?u=http://h/", None, "GET"),
    Case("other-letters", {"route": "/é/日#1"}, "/%C3%A9/%E6%97%A5%231", None, "GET"),
    Case("half-a-surrogate-pair", {"route": "/\ud83d"}, "/%ED%A0%BD", None, "GET"),
    Case("query", {"route": "/x", "query": {"a": 1, "b": "c d&é"}}, "/x?a=1&b=c+d%26%C3%A9", None, "GET"),
    Case("query-with-lists", {"route": "/x", "query": {"a": [1, 2]}}, "/x?a=1&a=2", None, "GET"),
    Case("query-as-text", {"route": "/x", "query": "a=1&b=c%20d"}, "/x?a=1&b=c%20d", None, "GET"),
    Case("query-as-loose-text", {"route": "/x", "query": "?a=1 2#\r\nX: y"}, "/x?a=1%202%23%0D%0AX:%20y", None, "GET"),
    Case("query-behind-another", {"route": "/x?a=1", "query": {"b": 2}}, "/x?a=1&b=2", None, "GET"),
    Case("query-with-half-a-pair", {"route": "/x", "query": {"a": "\ud83d"}}, "/x?a=%ED%A0%BD", None, "GET"),
    Case("query-text-with-half-a-pair", {"route": "/x", "query": "a=\ud83d"}, "/x?a=%ED%A0%BD", None, "GET"),
    Case("an-empty-query", {"route": "/x", "query": {}}, "/x", None, "GET"),
    Case(
        "it-comes-before-messages",
        {"route": "/x", "body": {"a": 1}, "messages": HI, "mode": "json"},
        "/x",
        ours(a=1),
    ),
)
@pytest.mark.parametrize("reader", [READER, LLM_READER], ids=["", "llm"])
def test_route(case: Case, reader: Reader) -> None:
    job = check(case, reader)
    assert job.is_list
    assert job.reshape is None


OURS = ("/ping", "/health", "/status", "/metrics", "/")
SPELLINGS = (
    "{}", "{}?", "{}?x=1", "{}/", "{}//", "/{}", "///{}", "/.{}", "/x/..{}", "/openai{}", "/openai/{}", "{}/.",
    "{}/x/..",
)  # fmt: skip


def escaped(path: str) -> str:
    """With each letter as an escape."""
    return "/" + "".join(f"%{ord(letter):02x}" for letter in path[1:])


def test_the_gateways_own_paths_are_those() -> None:
    assert {path.encode() for path in OURS} == OWN_PATHS
    assert set(OURS) == OWN_ROUTES


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("reader", [READER, LLM_READER], ids=["", "llm"])
def test_no_job_reaches_the_supervisors_own_routes(ours: str, reader: Reader) -> None:
    bare = [path for path in (ours[1:], escaped(ours)) if path]
    for route in [*(spelling.format(path) for spelling in SPELLINGS for path in (ours, escaped(ours))), *bare]:
        for content in (
            {"route": route},
            {"route": route, "method": "POST", "body": {"a": 1}},
            {"route": route, "query": {"x": 1}},
            {"openai_route": route},
            {"openai_route": route, "openai_input": {"messages": HI}},
        ):
            with pytest.raises(JobError) as caught:
                reader.read(content)
            error = caught.value
            assert (error.status, error.kind, error.param) == (403, "permission_error", "route"), content
            assert error.code == "route_not_open"
            assert f"{ours} is the supervisor's own" in error.message
            (item,) = items_of(reader, content)
            assert isinstance(item, JobError)
            assert item.code == "route_not_open"


@pytest.mark.parametrize("route", ["/root/status", "/root//status?x", "/root", "/root/", "/r%6fot/metrics", "/status"])
def test_nor_below_vllms_root_path(route: str) -> None:
    with pytest.raises(JobError) as caught:
        Reader("demo", root="/root/").read({"route": route})
    assert caught.value.code == "route_not_open"
    assert one({"route": "/root/v1/models"}, Reader("demo", root="/root/")).path == "/root/v1/models"
    assert one({"route": "/rooty/status"}, Reader("demo", root="/root/")).path == "/rooty/status"
    assert one({"route": "/root/status"}).path == "/root/status"


@pytest.mark.parametrize("text", ["a: b", "{a}", ""], ids=["text", "braces", "empty"])
def test_a_text_with_its_type_goes_as_it_is(text: str) -> None:
    request = one({"route": "/x", "body": text, "headers": {"content-type": "text/yaml"}})
    assert parts(request) == ("POST", "/x", {"content-type": "text/yaml"}, text.encode())


def test_a_text_that_is_no_json_needs_no_type() -> None:
    assert parts(one({"route": "/x", "body": "a: b\ud83d"})) == ("POST", "/x", {}, b"a: b?")


def test_headers_pass() -> None:
    given = {"X-Trace": "a b", "x-number": 1, "Accept": "text/plain, */*", "X-Latin": "caf\xe9", "X-API-Key": "k"}
    assert dict(one({"route": "/x", "headers": given}).headers) == {**given, "x-number": "1"}


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "connection",
        "Content-Length",
        "Expect",
        "HOST",
        "Keep-Alive",
        "Proxy-Authorization",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
    ],
)
def test_headers_of_the_clients_connection_do_not_pass(name: str) -> None:
    assert dict(one({"route": "/x", "headers": {name: "1", "X-Other": "2"}}).headers) == {"X-Other": "2"}


def test_the_content_type_is_that_of_what_is_sent() -> None:
    request = one({"route": "/x", "body": {"a": 1}, "headers": {"content-type": "text/plain", "X-A": "1"}})
    assert dict(request.headers) == {"X-A": "1", **JSON_TYPE}


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"X-A": "b\r\nX-C: d"}, "A header has a character that HTTP does not allow."),
        ({"X-A": "b\nc"}, "A header has a character that HTTP does not allow."),
        ({"X-A": "\x00"}, "A header has a character that HTTP does not allow."),
        ({"X-A": "\x7f"}, "A header has a character that HTTP does not allow."),
        ({"X-A": "日"}, "A header has a character that HTTP does not allow."),
        ({"X-A": "\ud83d"}, "A header has a character that HTTP does not allow."),
        ({"X A": "b"}, "'X A' is no name of a header."),
        ({"X-A:": "b"}, "'X-A:' is no name of a header."),
        ({"X-A\r\nX-B": "b"}, "'X-A\\r\\nX-B' is no name of a header."),
        ({"": "b"}, "'' is no name of a header."),
        ({"é": "b"}, "'é' is no name of a header."),
        (["X-A: b"], "headers must be an object."),
    ],
)
def test_headers_that_are_none(headers: object, message: str) -> None:
    error = refusal({"route": "/x", "headers": headers})
    assert (error.message, error.param) == (message, "headers")


def test_a_binary_body() -> None:
    request = one({"route": "/x", "body": BINARY, "headers": {"Content-Type": "text/plain", "X-A": "1"}})
    assert parts(request) == ("POST", "/x", {"X-A": "1", "Content-Type": "audio/wav"}, b"\x00\xff\r\n")


def test_base64_may_be_broken_into_lines() -> None:
    data = bytes(range(256))
    request = one({"route": "/x", "body": {"content_type": "a/b", "base64": base64.encodebytes(data).decode()}})
    assert request.body == data


def test_an_object_with_more_than_base64_is_json() -> None:
    body = {**BINARY, "more": 1}
    assert body_of(one({"route": "/x", "body": body})) == {**body, "model": "demo"}


# files


def parsed(request: Request) -> FormData:
    """What vLLM's own parser makes of a form."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": request.body, "more_body": False}

    headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
    scope = {"type": "http", "method": request.method, "path": request.path, "headers": headers}

    async def parse() -> FormData:
        return await HttpRequest(scope, receive).form()

    return asyncio.run(parse())


class File(NamedTuple):
    name: str | None
    content_type: str | None
    data: bytes


def files_of(form: FormData) -> dict[str, File]:
    return {
        name: File(value.filename, value.content_type, value.file.read())
        for name, value in form.multi_items()
        if isinstance(value, UploadFile)
    }


def fields_of(form: FormData) -> list[tuple[str, object]]:
    return [(name, value) for name, value in form.multi_items() if not isinstance(value, UploadFile)]


def test_files_are_a_form() -> None:
    data = bytes(range(256)) + b"\r\n--boundary--\r\n"
    given = {"base64": base64.b64encode(data).decode(), "filename": "a b.wav", "content_type": "audio/wav"}
    fields = {"language": "en", "temperature": 0.5, "stream": False, "prompt": "é\r\n日", "nothing": None}
    request = one({"route": "/v1/audio/transcriptions", "body": fields, "files": {"file": given}})
    assert (request.method, request.path) == ("POST", "/v1/audio/transcriptions")
    form = parsed(request)
    assert files_of(form) == {"file": File("a b.wav", "audio/wav", data)}
    assert fields_of(form) == [
        ("language", "en"),
        ("temperature", "0.5"),
        ("stream", "false"),
        ("prompt", "é\r\n日"),
        ("model", "demo"),
    ]


def test_files_with_the_least_said() -> None:
    request = one({"route": "/x", "files": {"file": BINARY["base64"], "second": {"base64": ""}}})
    form = parsed(request)
    assert files_of(form) == {
        "file": File("file", "application/octet-stream", b"\x00\xff\r\n"),
        "second": File("second", "application/octet-stream", b""),
    }
    assert fields_of(form) == [("model", "demo")]


def test_files_have_the_content_type_of_the_form() -> None:
    request = one({"route": "/x", "files": {"file": ""}, "headers": {"content-type": "audio/wav", "X-A": "1"}})
    assert request.headers.keys() == {"X-A", "Content-Type"}
    assert request.headers["Content-Type"].startswith("multipart/form-data; boundary=")


def test_a_list_in_a_form_is_its_field_again() -> None:
    fields = {"timestamp_granularities[]": ["word", "segment"], "model": "mine"}
    form = parsed(one({"route": "/x", "body": fields, "files": {"file": ""}}))
    assert fields_of(form) == [
        ("timestamp_granularities[]", "word"),
        ("timestamp_granularities[]", "segment"),
        ("model", "mine"),
    ]


@pytest.mark.parametrize("name", ["日本.wav", "naïve.wav", "a\\b.wav"])
def test_a_filename_arrives(name: str) -> None:
    form = parsed(one({"route": "/x", "files": {"file": {"base64": "", "filename": name}}}))
    assert files_of(form)["file"].name == name


@pytest.mark.parametrize("name", ['a".wav', "a\r\nX-B: c\r\n\r\n.wav", '"; name="model'])
def test_a_filename_breaks_nothing(name: str) -> None:
    form = parsed(one({"route": "/x", "files": {"file": {"base64": "YQ==", "filename": name}}}))
    assert {name: file.data for name, file in files_of(form).items()} == {"file": b"a"}
    assert fields_of(form) == [("model", "demo")]


def test_half_a_surrogate_pair_in_a_form() -> None:
    file = {"base64": "YQ==", "filename": "\ud83d.wav"}
    form = parsed(one({"route": "/x", "body": {"prompt": "a\ud83d", "\ud83d": "b"}, "files": {"file": file}}))
    assert files_of(form)["file"].name == "?.wav"
    assert fields_of(form) == [("prompt", "a?"), ("?", "b"), ("model", "demo")]


# messages, prompt


@cases(
    Case("messages", {"messages": HI}, CHAT, ours(messages=HI)),
    Case("requests-null", {"messages": HI, "requests": None}, CHAT, ours(messages=HI, requests=None)),
    Case(
        "sampling-params",
        {"messages": HI, "sampling_params": {"temperature": 0, "max_tokens": 5}},
        CHAT,
        {"messages": HI, "temperature": 0, "max_tokens": 5, "model": "demo"},
    ),
    Case(
        "fields-beside",
        {"messages": HI, "temperature": 0, "stream": True, "tools": [WEATHER], "model": "mine"},
        CHAT,
        {"messages": HI, "temperature": 0, "stream": True, "tools": [WEATHER], "model": "mine"},
    ),
    Case(
        "sampling-params-over-fields-beside",
        {"messages": HI, "sampling_params": {"n": 1, "model": "mine"}, "n": 2, "seed": 3, "model": "other"},
        CHAT,
        {"messages": HI, "n": 1, "seed": 3, "model": "mine"},
    ),
    Case("no-sampling-params", {"messages": HI, "sampling_params": None}, CHAT, ours(messages=HI)),
    Case("prompt", {"prompt": "a"}, COMPLETIONS, ours(prompt="a", max_tokens=512)),
    Case("max-tokens-beside", {"prompt": "a", "max_tokens": 3}, COMPLETIONS, ours(prompt="a", max_tokens=3)),
    Case(
        "max-tokens-in-sampling-params",
        {"prompt": "a", "sampling_params": {"max_tokens": 3}, "max_tokens": 4},
        COMPLETIONS,
        ours(prompt="a", max_tokens=3),
    ),
    Case(
        "prompts",
        {"prompt": ["a", "b"], "apply_chat_template": True},
        COMPLETIONS,
        ours(prompt=["a", "b"], max_tokens=512),
    ),
    Case("an-empty-prompt", {"prompt": ""}, COMPLETIONS, ours(prompt="", max_tokens=512)),
    Case("messages-win", {"messages": HI, "prompt": "a"}, CHAT, ours(messages=HI)),
    Case(
        "empty-messages-do-not",
        {"messages": [], "prompt": "a"},
        COMPLETIONS,
        ours(prompt="a", max_tokens=512),
    ),
    Case("apply-chat-template", {"prompt": "hi", "apply_chat_template": True}, CHAT, ours(messages=HI)),
    Case("as-text", {"prompt": "hi", "apply_chat_template": "true"}, CHAT, ours(messages=HI)),
    Case(
        "do-not-apply-it",
        {"prompt": "hi", "apply_chat_template": False},
        COMPLETIONS,
        ours(prompt="hi", max_tokens=512),
    ),
    Case(
        "chat-with-a-template-has-no-limit-of-ours",
        {"prompt": "hi", "apply_chat_template": True, "sampling_params": {"seed": 1}},
        CHAT,
        {"messages": HI, "seed": 1, "model": "demo"},
    ),
    Case(
        "old-batch-fields",
        {"messages": HI, "max_batch_size": 50, "min_batch_size": 1, "batch_size_growth_factor": 3},
        CHAT,
        ours(messages=HI),
    ),
    Case(
        "marks-that-are-null",
        {"messages": HI, "stream": True, "mode": None, "schema": None, "regex": None},
        CHAT,
        {"messages": HI, "stream": True, "mode": None, "schema": None, "regex": None, "model": "demo"},
    ),
)
def test_short(case: Case) -> None:
    job = check(case, READER)
    assert job.is_list
    assert job.reshape is None


def test_sampling_params_say_that_an_llm_worker_s_client_knows_the_short_shape() -> None:
    content = {"messages": HI, "sampling_params": {"max_tokens": 5}, "stream": True}
    job = LLM_READER.read(content)
    assert job == READER.read(content)
    assert job.is_list
    assert job.reshape is None


# runpod-LLM


def llm(**body: object) -> dict[str, object]:
    """A body with all that is filled in where nothing is said."""
    return {"temperature": 0.7, "top_p": 1.0, "max_tokens": 512, "model": "demo", **body}


def json_schema(schema: object, **more: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "result", "schema": schema, **more}}}


CONSTRAINED = json_schema(SCHEMA)
JSON_OBJECT = {"response_format": {"type": "json_object"}}
SAID = {"temperature": 0, "top_p": 0.5, "max_tokens": 7, "top_k": 5, "stop": "x", "n": 2, "model": "mine"}
LLM_CASES = (
    Case("chat", {"mode": "chat", "messages": HI}, CHAT, llm(messages=HI)),
    Case("any-case", {"mode": "Chat", "messages": HI}, CHAT, llm(messages=HI)),
    Case("chat-with-a-prompt", {"mode": "chat", "prompt": "hi"}, CHAT, llm(messages=HI)),
    Case("complete", {"mode": "complete", "prompt": "a"}, COMPLETIONS, llm(prompt="a")),
    Case("completion", {"mode": "completion", "prompt": "a"}, COMPLETIONS, llm(prompt="a")),
    Case(
        "complete-wants-the-prompt", {"mode": "complete", "prompt": "a", "messages": HI}, COMPLETIONS, llm(prompt="a")
    ),
    Case(
        "what-is-given-counts",
        {"mode": "chat", "messages": HI, **SAID},
        CHAT,
        {"messages": HI, **SAID},
    ),
    Case(
        "what-is-null-does-not",
        {"mode": "chat", "messages": HI, **dict.fromkeys(SAID), "tools": None},
        CHAT,
        llm(messages=HI),
    ),
    Case(
        "sampling-params-count-most",
        {"mode": "chat", "messages": HI, "n": 7, "sampling_params": {"n": 3, "temperature": 0, "stream": True}},
        CHAT,
        llm(messages=HI, n=3, temperature=0),
    ),
    Case(
        "nothing-streams-and-a-best-of-of-one-asks-for-nothing",
        {"mode": "chat", "messages": HI, "stream": True, "stream_options": {"include_usage": True}, "best_of": 1},
        CHAT,
        llm(messages=HI),
    ),
    Case(
        "old-batch-fields",
        {"mode": "complete", "prompt": "a", "max_batch_size": 5, "apply_chat_template": True},
        COMPLETIONS,
        llm(prompt="a"),
    ),
    Case(
        "tools",
        {"mode": "chat", "messages": HI, "tools": [WEATHER], "tool_choice": "required"},
        CHAT,
        llm(messages=HI, tools=[WEATHER], tool_choice="required"),
    ),
    Case("json", {"mode": "json", "messages": HI}, CHAT, llm(messages=HI, **JSON_OBJECT)),
    Case("json-with-a-prompt", {"mode": "json", "prompt": "a"}, COMPLETIONS, llm(prompt="a", **JSON_OBJECT)),
    Case("json-schema", {"mode": "json", "messages": HI, "json_schema": SCHEMA}, CHAT, llm(messages=HI, **CONSTRAINED)),
    Case("schema", {"mode": "json", "messages": HI, "schema": SCHEMA}, CHAT, llm(messages=HI, **CONSTRAINED)),
    Case(
        "json-schema-before-schema",
        {"messages": HI, "schema": {"type": "array"}, "json_schema": SCHEMA},
        CHAT,
        llm(messages=HI, **CONSTRAINED),
    ),
    Case("schema-as-text", {"messages": HI, "schema": json.dumps(SCHEMA)}, CHAT, llm(messages=HI, **CONSTRAINED)),
    Case(
        "openais-schema",
        {"messages": HI, "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}},
        CHAT,
        llm(messages=HI, **json_schema(SCHEMA, name="place", strict=True)),
    ),
    Case(
        "openais-schema-without-its-name",
        {"messages": HI, "json_schema": {"schema": SCHEMA}},
        CHAT,
        llm(messages=HI, **CONSTRAINED),
    ),
    Case(
        "a-schema-with-a-word-of-that-name",
        {"messages": HI, "json_schema": {"type": "object", "schema": {}}},
        CHAT,
        llm(messages=HI, **json_schema({"type": "object", "schema": {}})),
    ),
    Case("a-schema-means-json", {"prompt": "a", "schema": SCHEMA}, COMPLETIONS, llm(prompt="a", **CONSTRAINED)),
    Case("regex", {"messages": HI, "regex": "a+"}, CHAT, llm(messages=HI, structured_outputs={"regex": "a+"})),
    Case(
        "guided-regex",
        {"messages": HI, "guided_regex": "a+"},
        CHAT,
        llm(messages=HI, structured_outputs={"regex": "a+"}),
    ),
    Case(
        "a-schema-before-a-regex",
        {"messages": HI, "schema": SCHEMA, "regex": "a"},
        CHAT,
        llm(messages=HI, **CONSTRAINED),
    ),
    Case(
        "an-empty-schema-is-none", {"mode": "json", "messages": HI, "schema": {}}, CHAT, llm(messages=HI, **JSON_OBJECT)
    ),
    Case(
        "vllms-own-words-count",
        {"mode": "json", "messages": HI, **json_schema(SCHEMA)},
        CHAT,
        llm(messages=HI, **CONSTRAINED),
    ),
    Case("chat-has-no-constraint", {"mode": "chat", "messages": HI, "schema": SCHEMA}, CHAT, llm(messages=HI)),
)


@cases(*LLM_CASES)
@pytest.mark.parametrize("reader", [READER, LLM_READER], ids=["", "llm"])
def test_llm(case: Case, reader: Reader) -> None:
    job = check(case, reader)
    assert job.reshape is not None
    assert not job.is_list


@cases(
    Case("messages", {"messages": HI, "stream": True}, CHAT, llm(messages=HI)),
    Case("prompt", {"prompt": "hi"}, CHAT, llm(messages=HI)),
)
def test_messages_alone_are_runpod_llms_where_its_model_variable_is_used(case: Case) -> None:
    job = check(case, LLM_READER)
    assert job.reshape is not None
    assert not job.is_list


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        ({"mode": "chat", "messages": HI}, "chat"),
        ({"mode": "completion", "prompt": "a"}, "complete"),
        ({"mode": "JSON", "prompt": "a"}, "json"),
        ({"messages": HI, "schema": SCHEMA}, "json"),
        ({"messages": HI, "regex": "a"}, "json"),
    ],
)
def test_the_result_says_its_mode(content: object, mode: str) -> None:
    shape = READER.read(content).reshape
    assert shape is not None
    assert shape({})["mode"] == mode


# Limits, and fields of old


@pytest.mark.parametrize("longest", [None, 400, 2048])
@pytest.mark.parametrize("given", [None, 16, 400, 401, 1_000_000_000, True, "7"])
@pytest.mark.parametrize("within", ["beside", "sampling_params"])
def test_a_limit_fits_the_model(longest: int | None, given: object, within: str) -> None:
    """null is none; ours is what the model can take at most; one beyond that is as much as there is room for."""
    reader = Reader("demo", max_len=longest)
    limit = {"max_tokens": given} if within == "beside" else {"sampling_params": {"max_tokens": given}}
    if given is None:
        expected: object = min(512, longest or 512)
    else:
        expected = min(given, longest) if type(given) is int and longest else given
    assert body_of(one({"prompt": "a", **limit}, reader))["max_tokens"] == expected
    assert body_of(one({"mode": "complete", "prompt": "a", **limit}, reader))["max_tokens"] == expected
    chat = body_of(one({"messages": HI, **limit}, reader))
    assert chat.get("max_tokens") == (None if given is None else expected)


def test_no_limit_is_two() -> None:
    reader = Reader("demo", max_len=400)
    body = body_of(one({"messages": HI, "max_completion_tokens": 5000}, reader))
    assert body["max_completion_tokens"] == 400
    assert "max_tokens" not in body


def test_what_is_passed_on_as_it_is_has_the_limit_that_was_sent() -> None:
    reader = Reader("demo", max_len=400)
    sent = {"prompt": "a", "max_tokens": 5000}
    assert body_of(one({"openai_route": COMPLETIONS, "openai_input": sent}, reader)) == ours(**sent)


OLD = {
    "guided_json": ("json", SCHEMA),
    "guided_regex": ("regex", "[0-9]+"),
    "guided_choice": ("choice", ["a", "b"]),
    "guided_grammar": ("grammar", "root ::= x"),
    "guided_json_object": ("json_object", True),
    "guided_whitespace_pattern": ("whitespace_pattern", "[ ]"),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize(
    "shape",
    [
        lambda given: {"messages": HI, **given},
        lambda given: {"prompt": "a", "sampling_params": given},
        lambda given: {"mode": "json", "messages": HI, **given},
        lambda given: {"openai_route": CHAT, "openai_input": {"messages": HI, **given}},
        lambda given: {"route": CHAT, "body": {"messages": HI, **given}},
    ],
    ids=["beside", "sampling", "llm", "openai", "route"],
)
def test_a_constraint_of_old_is_one_of_today(
    name: str, shape: Callable[[dict[str, object]], dict[str, object]]
) -> None:
    """vLLM passes over what it does not know: the answer would not be constrained, and nobody told."""
    new, value = OLD[name]
    body = body_of(one(shape({name: value})))
    assert body["structured_outputs"] == {new: value}
    assert name not in body
    assert "response_format" not in body


def test_several_constraints_are_vllms_to_judge() -> None:
    body = body_of(one({"prompt": "a", "guided_regex": "x", "structured_outputs": {"choice": ["x"]}}))
    assert body["structured_outputs"] == {"choice": ["x"], "regex": "x"}


@pytest.mark.parametrize("nothing", [{"guided_json": None}, {"best_of": 1}, {"best_of": 3, "n": 3}, {"best_of": None}])
def test_a_field_of_old_that_asks_for_nothing_is_left_out(nothing: dict[str, object]) -> None:
    body = body_of(one({"prompt": "a", **nothing}))
    assert body.keys() <= {"prompt", "model", "max_tokens", "n"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"best_of": 2}, "ask for `n` answers"),
        ({"best_of": 4, "n": 2}, "ask for `n` answers"),
        ({"early_stopping": True}, "leave it out"),
        ({"guided_decoding_backend": "outlines"}, "STRUCTURED_OUTPUTS_CONFIG"),
        ({"guided_regex": "x", "structured_outputs": {"regex": "y"}}, "is there twice"),
        ({"guided_regex": "x", "structured_outputs": ["y"]}, "must be an object"),
        ({"guided_regex": "x", "structured_outputs": "y"}, "structured_outputs is text that is no JSON"),
    ],
)
def test_a_field_that_is_gone_is_told(given: dict[str, object], words: str) -> None:
    for content in ({"prompt": "a", **given}, {"mode": "chat", "messages": HI, **given}):
        with pytest.raises(JobError, match=words) as caught:
            one(content)
        assert caught.value.status == 400


@pytest.mark.parametrize("yes", [True, "true", "True"])
def test_a_chat_template_may_be_asked_for_in_words(yes: object) -> None:
    assert one({"prompt": "a", "apply_chat_template": yes}).path == CHAT


def test_sampling_params_may_be_json_text() -> None:
    assert body_of(one({"prompt": "a", "sampling_params": '{"n": 2}'}))["n"] == 2
    with pytest.raises(JobError, match="sampling_params is text that is no JSON"):
        one({"prompt": "a", "sampling_params": "{n"})


# A batch


def test_a_batch_of_every_shape_with_bad_ones_among_them() -> None:
    items = [
        {"messages": HI},
        {"mode": "complete", "prompt": "a", "max_tokens": 3},
        {"prompt": "a", "mode": "nonsense"},
        {"prompt": "a", "schema": SCHEMA},
        {"messages": HI, "sampling_params": {"max_tokens": 4}},
        {"openai_route": "/v1/models"},
        {"openai_input": {"messages": HI}},
        {"route": "/tokenize", "body": {"prompt": "a"}},
        "text",
        {},
        {"requests": [{"prompt": "a"}]},
        {"route": "/\ud83d", "query": "\ud83d"},
        {"openai_input": DEEP},
    ]
    found = [
        item.message if isinstance(item, JobError) else (item.request and item.request.path, item.reshape is not None)
        for item in items_of(READER, *items)
    ]
    assert found == [
        (CHAT, True),
        (COMPLETIONS, True),
        "mode 'nonsense' is not one of: chat, complete, completion, json.",
        (COMPLETIONS, True),
        (CHAT, False),
        ("/v1/models", False),
        (CHAT, False),
        ("/tokenize", False),
        NO_OBJECT,
        NO_OBJECT,
        "A batch can't hold another one.",
        ("/%ED%A0%BD?%ED%A0%BD", False),
        "The input is nested too deeply.",
    ]


def test_a_batch_comes_before_all_others() -> None:
    job = READER.read({"requests": [{"prompt": "a"}], "openai_input": {"a": 1}, "route": "/x", "messages": HI})
    assert len(job.batch) == 1


@pytest.mark.parametrize(
    ("item", "body"),
    [
        ({"messages": HI, "stream": True}, llm(messages=HI)),
        (
            {"messages": HI, "sampling_params": {"stream": True, "n": 2, "stream_options": {"include_usage": True}}},
            {"messages": HI, "n": 2, "model": "demo"},
        ),
        (
            {"messages": HI, "stream": True, "stream_options": {"include_usage": True}, "sampling_params": {"n": 2}},
            {"messages": HI, "n": 2, "model": "demo"},
        ),
        ({"openai_input": {"messages": HI, "stream": True}}, {"messages": HI, "model": "demo"}),
        (
            {"openai_input": {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}},
            {"messages": HI, "model": "demo"},
        ),
        ({"openai_input": '{"stream": true, "n": 2}'}, NO_STREAM),
        ({"route": CHAT, "body": {"stream": True, "n": 2}}, NO_STREAM),
        ({"route": CHAT, "body": '{"stream": true, "n": 2}'}, NO_STREAM),
    ],
    ids=["llm", "sampling-params", "beside", "openai", "openai-options", "openai-text", "route", "route-text"],
)
def test_nothing_streams_in_a_batch(item: dict[str, Any], body: object) -> None:
    given = json.dumps(item)
    (job,) = items_of(READER, item)
    assert isinstance(job, Plan)
    assert job.request is not None
    assert body_of(job.request) == body
    assert json.dumps(item) == given


def test_a_form_does_not_stream_in_a_batch() -> None:
    item = {"route": "/x", "body": {"stream": True, "language": "en"}, "files": {"file": ""}}
    (job,) = items_of(READER, item)
    assert isinstance(job, Plan)
    assert job.request is not None
    assert dict(fields_of(parsed(job.request))) == {"language": "en", "model": "demo"}


# What is no request


class Wrong(NamedTuple):
    name: str
    input: object
    message: str
    param: str | None = None


NO_OBJECT = "The input must be an object with one of: openai_route, route, messages, prompt, mode, requests."
NO_PATH = "The route must be a path, such as /v1/chat/completions."
NO_METHOD = "method must be an HTTP method, such as POST."
NO_BASE64 = "body has no base64 that can be read."
NO_HEADER = "A header has a character that HTTP does not allow."
NO_FILES = "files must be an object."
NO_SAMPLING = "sampling_params must be an object."
NO_MESSAGES = "messages is empty, and there is no prompt."
NO_REQUESTS = "requests must be a list with at least one request."
NO_JSON = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
WRONG = (
    Wrong("empty", {}, NO_OBJECT),
    Wrong("none", None, NO_OBJECT),
    Wrong("text", "hi", NO_OBJECT),
    Wrong("list", [{"prompt": "a"}], NO_OBJECT),
    Wrong("unknown", {"question": "hi"}, NO_OBJECT),
    Wrong("only-sampling-params", {"sampling_params": {"n": 1}}, NO_OBJECT),
    Wrong("only-mode", {"mode": "chat"}, "mode chat needs messages.", "messages"),
    Wrong("only-mode-json", {"mode": "json"}, "mode json needs messages or prompt.", "messages"),
    Wrong("empty-openai-input", {"openai_input": {}}, NO_OBJECT),
    Wrong(
        "openai-input-no-json",
        {"openai_input": "{hi"},
        f"openai_input is text that is no JSON ({NO_JSON}).",
        "openai_input",
    ),
    Wrong("openai-input-too-deep", {"openai_input": DEEP}, "The input is nested too deeply."),
    Wrong("schema-too-deep", {"prompt": "a", "schema": DEEP}, "The input is nested too deeply."),
    Wrong("body-no-json", {"route": "/x", "body": "{hi"}, f"body is text that is no JSON ({NO_JSON}).", "body"),
    Wrong("a-url", {"route": "http://elsewhere/x"}, NO_PATH, "route"),
    Wrong("a-url-of-openai", {"openai_route": "https://elsewhere/v1"}, NO_PATH, "route"),
    Wrong("route-with-a-blank", {"route": "/a b"}, NO_PATH, "route"),
    Wrong("route-with-a-line-end", {"route": "/a\r\nX: y"}, NO_PATH, "route"),
    Wrong("route-is-a-number", {"route": 1}, NO_PATH, "route"),
    Wrong("openai-route-is-a-list", {"openai_route": ["/x"], "openai_input": {"a": 1}}, NO_PATH, "route"),
    Wrong("method", {"route": "/x", "method": "GET /y"}, NO_METHOD, "method"),
    Wrong("method-in-other-letters", {"route": "/x", "method": "PÖST"}, NO_METHOD, "method"),
    Wrong("method-is-a-number", {"route": "/x", "method": 1}, NO_METHOD, "method"),
    Wrong("query", {"route": "/x", "query": 5}, "query must be an object or text.", "query"),
    Wrong("query-is-a-list", {"route": "/x", "query": [["a", "b"]]}, "query must be an object or text.", "query"),
    Wrong("base64", {"route": "/x", "body": {**BINARY, "base64": "?"}}, NO_BASE64, "body"),
    Wrong("base64-cut-off", {"route": "/x", "body": {**BINARY, "base64": "YQ"}}, NO_BASE64, "body"),
    Wrong("base64-is-null", {"route": "/x", "body": {**BINARY, "base64": None}}, NO_BASE64, "body"),
    Wrong("base64-in-other-letters", {"route": "/x", "body": {**BINARY, "base64": "é"}}, NO_BASE64, "body"),
    Wrong(
        "content-type",
        {"route": "/x", "body": {**BINARY, "content_type": "a\r\nb"}},
        NO_HEADER,
        "headers",
    ),
    Wrong("files", {"route": "/x", "files": ["YQ=="]}, NO_FILES, "files"),
    Wrong(
        "file-without-base64",
        {"route": "/x", "files": {"file": {"filename": "a"}}},
        "files.file has no base64 that can be read.",
        "files.file",
    ),
    Wrong("file-is-a-number", {"route": "/x", "files": {"file": 1}}, "files.file must be an object.", "files.file"),
    Wrong(
        "file-base64",
        {"route": "/x", "files": {"file": "?"}},
        "files.file has no base64 that can be read.",
        "files.file",
    ),
    Wrong(
        "file-content-type",
        {"route": "/x", "files": {"file": {"base64": "", "content_type": "a\nb"}}},
        NO_HEADER,
        "headers",
    ),
    Wrong(
        "files-beside-a-list",
        {"route": "/x", "files": {"file": ""}, "body": ["a"]},
        "body must be an object.",
        "body",
    ),
    Wrong("sampling-params", {"prompt": "a", "sampling_params": [1]}, NO_SAMPLING, "sampling_params"),
    Wrong(
        "sampling-params-no-json",
        {"prompt": "a", "sampling_params": "{n=1"},
        f"sampling_params is text that is no JSON ({NO_JSON}).",
        "sampling_params",
    ),
    Wrong(
        "headers-no-json",
        {"route": "/x", "headers": "{X-A: b"},
        f"headers is text that is no JSON ({NO_JSON}).",
        "headers",
    ),
    Wrong(
        "sampling-params-and-mode",
        {"mode": "chat", "prompt": "a", "sampling_params": [1]},
        NO_SAMPLING,
        "sampling_params",
    ),
    Wrong("no-messages", {"messages": []}, NO_MESSAGES, "messages"),
    Wrong("messages-null", {"messages": None}, NO_MESSAGES, "messages"),
    Wrong("prompt-null", {"prompt": None}, NO_MESSAGES, "messages"),
    Wrong(
        "mode", {"mode": "poem", "prompt": "a"}, "mode 'poem' is not one of: chat, complete, completion, json.", "mode"
    ),
    Wrong("chat-without-messages", {"mode": "chat", "messages": []}, "mode chat needs messages.", "messages"),
    Wrong("complete-without-a-prompt", {"mode": "complete", "messages": HI}, "mode complete needs prompt.", "prompt"),
    Wrong("json-without-either", {"mode": "json", "messages": []}, "mode json needs messages or prompt.", "messages"),
    Wrong(
        "schema-no-json",
        {"prompt": "a", "schema": "{hi"},
        f"schema is text that is no JSON ({NO_JSON}).",
        "schema",
    ),
    Wrong("schema-no-object", {"prompt": "a", "schema": [1]}, "schema must be an object.", "schema"),
    Wrong(
        "schema-text-no-object", {"prompt": "a", "json_schema": "5"}, "json_schema must be an object.", "json_schema"
    ),
    Wrong("no-requests", {"requests": []}, NO_REQUESTS, "requests"),
    Wrong("requests-null", {"requests": None}, NO_OBJECT),
    Wrong("requests-no-list", {"requests": {"prompt": "a"}}, NO_REQUESTS, "requests"),
)


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.name for wrong in WRONG])
def test_what_is_wrong_is_said(wrong: Wrong) -> None:
    error = refusal(wrong.input)
    assert (error.message, error.param) == (wrong.message, wrong.param)
    assert json.loads(error.text)["status"] == 400


# Answers

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": None}
COUNTS = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
CALL = {"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}


def answer(*choices: dict[str, Any], **more: object) -> dict[str, Any]:
    return {"id": "cmpl-1", "object": "x", "created": 1, "model": "demo", "choices": [*choices], "usage": USAGE, **more}


def message(content: str | None, **more: object) -> dict[str, Any]:
    said = {"role": "assistant", "content": content, "refusal": None, "reasoning": None, **more}
    return {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}


def test_result_of_a_chat() -> None:
    assert llm_result(answer(message("Hello.", tool_calls=[])), "chat") == {
        "id": "cmpl-1",
        "model": "demo",
        "mode": "chat",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}},
        ],
        "usage": COUNTS,
    }


def test_result_of_a_completion() -> None:
    choice = {"index": 0, "text": " upon a time", "logprobs": None, "finish_reason": "length"}
    assert llm_result(answer(choice), "complete")["choices"] == [
        {"index": 0, "finish_reason": "length", "text": " upon a time"}
    ]


@pytest.mark.parametrize(("content", "kept"), [(None, None), ("", None), ("Let me see.", "Let me see.")])
def test_result_of_tool_calls(content: str | None, kept: str | None) -> None:
    (choice,) = llm_result(answer(message(content, tool_calls=[CALL])), "chat")["choices"]
    assert choice["message"] == {"role": "assistant", "content": kept, "tool_calls": [CALL]}


def test_an_empty_text_stays_one() -> None:
    (choice,) = llm_result(answer(message("", tool_calls=[])), "chat")["choices"]
    assert choice["message"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("text", ['{"city": "Rome", "n": [1.5, null]}', "5", '"é"', "null", " [] "])
def test_json_that_parses(text: str) -> None:
    (choice,) = llm_result(answer(message(text)), "json")["choices"]
    assert choice["message"]["content"] == text
    assert choice["json"] == json.loads(text)
    assert "json_parse_error" not in choice


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"city": "Ro', "Unterminated string"),
        ("Sure! {}", "Expecting value"),
        ("", "Expecting value"),
        (None, "Expecting value"),
        ("{} {}", "Extra data"),
        ("NaN", "not JSON compliant"),
        ("[1e999]", "not JSON compliant"),
        ("1" * 5000, "digits"),
        (DEEP, "while decoding a JSON array"),
    ],
    ids=["cut-off", "prose", "empty", "null", "two", "nan", "infinity", "digits", "deep"],
)
def test_json_that_does_not(text: str | None, why: str) -> None:
    (choice,) = llm_result(answer(message(text)), "json")["choices"]
    assert choice["message"]["content"] == text
    assert "json" not in choice
    assert why in choice["json_parse_error"]
    json.dumps(choice, allow_nan=False)


def test_json_of_a_completion() -> None:
    (choice,) = llm_result(answer({"index": 0, "text": "[1]", "finish_reason": "stop"}), "json")["choices"]
    assert choice == {"index": 0, "finish_reason": "stop", "text": "[1]", "json": [1]}


def test_result_of_several_choices() -> None:
    first, second = message("[1]"), {**message("no"), "index": 1, "finish_reason": "length"}
    choices = llm_result(answer(first, second), "json")["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]
    assert choices[0]["json"] == [1]
    assert "json_parse_error" in choices[1]


def test_result_of_an_answer_without_usage() -> None:
    result = llm_result({"id": "a", "choices": [{"message": None}, {"text": "b"}], "usage": None}, "chat")
    assert result["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert [choice["index"] for choice in result["choices"]] == [0, 1]
    assert result["choices"][0]["message"] == {"role": "assistant", "content": None}


# Errors


class Failure(NamedTuple):
    name: str
    status: int
    body: bytes
    message: str
    kind: str = "upstream_error"
    param: object = None
    code: object = None


def of(content: object) -> bytes:
    return json.dumps(content).encode()


FAILURES = (
    Failure(
        "openai",
        404,
        of({"error": {"message": "No such model.", "type": "NotFoundError", "param": "model", "code": 404}}),
        "No such model.",
        "NotFoundError",
        "model",
        404,
    ),
    Failure("the-least", 400, of({"error": {"message": "No."}}), "No."),
    Failure(
        "anthropic",
        529,
        of({"type": "error", "error": {"type": "overloaded_error", "message": "Busy."}, "request_id": "a"}),
        "Busy.",
        "overloaded_error",
    ),
    Failure("detail", 404, of({"detail": "Not Found"}), "HTTP 404: Not Found"),
    Failure(
        "details",
        422,
        b'{"detail":[{"loc":["body"],"msg":"Field required"}]}',
        'HTTP 422: {"detail":[{"loc":["body"],"msg":"Field required"}]}',
    ),
    Failure("error-text", 500, of({"error": "Oh no"}), "HTTP 500: Oh no"),
    Failure("another-object", 500, b'{"oh": "no"}', 'HTTP 500: {"oh": "no"}'),
    Failure("no-object", 500, b"[1]", "HTTP 500: [1]"),
    Failure("text", 502, b"Bad Gateway\n", "HTTP 502: Bad Gateway"),
    Failure("bytes", 500, b"\xff\xfe\x00", "HTTP 500: ��\x00"),
    Failure("nothing", 500, b"", "HTTP 500: no further word"),
    Failure("long", 500, b"x" * 9000, "HTTP 500: " + "x" * 4000),
)


@pytest.mark.parametrize("failure", FAILURES, ids=[failure.name for failure in FAILURES])
def test_the_error_of_an_answer(failure: Failure) -> None:
    error = JobError.from_answer(failure.body, failure.status)
    assert json.loads(error.text) == {
        "message": failure.message,
        "type": failure.kind,
        "param": failure.param,
        "code": failure.code,
        "status": failure.status,
    }
    assert str(error) == failure.message


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"error": {"message": "No.", "type": "Odd", "code": 500}}, ("No.", "Odd", 500)),
        ({"error": {"message": "No.", "code": "odd"}}, ("No.", "upstream_error", 503)),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "No."}}, ("No.", "overloaded_error", 503)),
        ({"type": "error", "message": "No.", "code": 418}, ("No.", "upstream_error", 418)),
        ({"oh": "no"}, ("The engine stopped in the middle of this answer", "service_unavailable", 503)),
        ("no", ("The engine stopped in the middle of this answer", "service_unavailable", 503)),
    ],
    ids=["openai", "no-status", "anthropic", "responses", "nothing", "text"],
)
def test_the_error_of_an_event(event: object, expected: tuple[str, str, int]) -> None:
    error = JobError.from_answer(of(event))
    assert (error.message.partition(". ")[0], error.kind, error.status) == expected


def test_an_errors_text_keeps_its_letters() -> None:
    assert "日本" in JobError("日本").text


def test_what_is_null_in_headers_and_query_is_missing() -> None:
    content = {
        "route": "/x",
        "headers": {"Content-Type": None, "X-A": "b"},
        "query": {"a": None, "b": 1},
        "body": '{"c": 1}',
    }
    request = READER.read(content).request
    assert request is not None
    assert request.path == "/x?b=1"
    assert dict(request.headers) == {"X-A": "b", "Content-Type": "application/json"}
