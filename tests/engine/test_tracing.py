"""Traces: what reaches an OTLP collector, what does not, and what a collector that is not well does to requests."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from supervisor.gateway import tracing
from tests.harness import RawClient, Supervisor, wait_until

COMPLETIONS = "/v1/completions"
PROMPT = "a sentence that nobody else writes"
SERVER = Span.SpanKind.SPAN_KIND_SERVER
ERROR = Status.StatusCode.STATUS_CODE_ERROR
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP, or does not: answers `status`, or 0: nothing."""

    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.status = status
        self.over = threading.Event()
        self.posts = 0
        self.raw: list[bytes] = []
        self.asked: list[str] = []
        self.resource: dict[str, object] = {}
        self.spans: list[Span] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    @property
    def environ(self) -> dict[str, str]:
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "OTEL_BSP_SCHEDULE_DELAY": "20"}

    def take(self, path: str, body: bytes) -> None:
        self.asked.append(path)
        self.raw.append(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = attributes(group.resource)
            self.spans += [span for scope in group.scope_spans for span in scope.spans]

    def trace_of(self, request_id: str) -> tuple[Span, list[Span]]:
        """The server's span of a request, and those below it in the order of their beginnings."""

        def found() -> list[Span]:
            return [span for span in self.spans if attributes(span).get("vllm_supervisor.request_id") == request_id]

        (server,) = wait_until(found, f"the span of {request_id}")
        below = [
            span for span in self.spans if span.parent_span_id == server.span_id
        ]  # they came before it, or with it
        return server, sorted(below, key=lambda span: span.start_time_unix_nano)


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Collector
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts += 1
        if self.server.status == 0:
            self.server.over.wait(20)
            return
        if self.server.status == 200:
            self.server.take(self.path, body)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def attributes(of: object) -> dict[str, object]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in of.attributes}  # type: ignore[attr-defined]


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def fault(**keys: object) -> dict[str, str]:
    return {"X-Fake": json.dumps(keys)}


def named(request_id: str, parent: str = PARENT, **more: str) -> dict[str, str]:
    return {"X-Request-Id": request_id, "traceparent": parent, **more}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def supervisor(collector: Collector) -> Iterator[Supervisor]:
    """One request at a time."""
    with Supervisor("some/model", environ=collector.environ | {"SUPERVISOR_MAX_CONCURRENCY": "1"}) as supervisor:
        supervisor.ready().says("traces go to http://127")
        yield supervisor


@pytest.fixture(scope="module")
def client(supervisor: Supervisor) -> httpx.Client:
    return supervisor.client


def test_a_request_is_a_span_below_its_clients(collector: Collector, client: httpx.Client) -> None:
    began = time.time()
    answer = client.post(
        f"{COMPLETIONS}?word=secret", json={"prompt": PROMPT}, headers=named("plain", tracestate="v=1")
    )
    server, (relay,) = collector.trace_of("plain")
    assert (server.name, server.kind, relay.name) == ("POST /v1/completions", SERVER, "relay")
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, "b7ad6b7169203331")
    assert (server.trace_state, relay.trace_id) == ("v=1", server.trace_id)
    assert attributes(server) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": COMPLETIONS,
        "url.path": COMPLETIONS,
        "url.scheme": "http",
        "vllm_supervisor.request_id": "plain",
    }
    assert server.status.code == 0
    assert [event.name for event in server.events] == ["first_byte"]
    # The loop's clock counts in milliseconds.
    assert began - 0.01 < server.start_time_unix_nano / 1e9 <= server.end_time_unix_nano / 1e9 < time.time() + 0.01
    assert server.start_time_unix_nano <= relay.start_time_unix_nano <= relay.end_time_unix_nano
    assert relay.end_time_unix_nano <= server.end_time_unix_nano
    assert collector.asked[0] == "/v1/traces"
    assert not [raw for raw in collector.raw if PROMPT.encode() in raw or b"secret" in raw]
    assert not [raw for raw in collector.raw if answer.json()["choices"][0]["text"].encode() in raw]


def test_the_resource_says_who_it_is(collector: Collector, client: httpx.Client) -> None:
    client.post(COMPLETIONS, json={"prompt": "x"}, headers=named("resource"))
    collector.trace_of("resource")
    expected = {
        "service.name": "vllm-supervisor", "service.version": "0.1.0",
        "vllm_supervisor.model": "some/model", "vllm_supervisor.vllm_version": "0.32.0",
    }  # fmt: skip
    assert expected.items() <= collector.resource.items()


def test_without_a_parent_a_trace_begins_here(collector: Collector, client: httpx.Client) -> None:
    """Neither do two parents make one. A head that comes again takes a shorter way; it has a span, too."""
    for parents in ([], [("traceparent", PARENT)] * 2, [("traceparent", "00-xyz")]):
        ids = [
            client.post(COMPLETIONS, json={"prompt": "x"}, headers=parents).headers["x-request-id"] for _ in range(2)
        ]
        spans = [collector.trace_of(request_id)[0] for request_id in ids]
        assert [span.parent_span_id for span in spans] == [b"", b""]
        assert len({span.trace_id for span in spans} | {bytes.fromhex(TRACE)}) == 3


def test_a_parent_that_is_not_sampled_has_no_children(collector: Collector, client: httpx.Client) -> None:
    client.post(COMPLETIONS, json={"prompt": "x"}, headers=named("unsampled", PARENT[:-1] + "0"))
    client.post(COMPLETIONS, json={"prompt": "x"}, headers=named("sampled"))
    collector.trace_of("sampled")
    assert "unsampled" not in [attributes(span).get("vllm_supervisor.request_id") for span in collector.spans]


@pytest.mark.parametrize("names", [("traceparent", "tracestate", "baggage"), ("TraceParent", "TRACESTATE", "Baggage")])
def test_the_context_reaches_vllm_as_it_came(supervisor: Supervisor, names: tuple[str, str, str]) -> None:
    """For the first time, and again: from the same connection, and from another."""
    state = "congo=t61rcWkgMzE,  rojo=00f067aa0ba902b7"
    values = (PARENT, state, "userId=al%20ice;p=1, key = value")
    lines = [f"{name}: {value}" for name, value in zip(names, values, strict=True)]
    lines += [f"{names[1]}: second=1"]
    fields = "\r\n".join(lines)
    request = f"POST /fake/echo/t HTTP/1.1\r\nHost: h\r\n{fields}\r\nContent-Length: 2\r\n\r\nok".encode()
    for connection in range(2):
        with RawClient(supervisor.port) as raw:
            for turn in range(3):
                seen = raw.send(request).answer().json()
                assert isinstance(seen, dict)
                passed = [
                    f"{name}: {value}" for name, value in seen["headers"] if name.lower() in map(str.lower, names)
                ]
                assert passed == lines, (connection, turn)


def test_none_is_added(client: httpx.Client) -> None:
    seen = client.post("/fake/echo/n", content=b"x").json()
    assert not {name.lower() for name, _ in seen["headers"]} & {"traceparent", "tracestate", "baggage"}


def test_a_job_of_the_queue_has_its_own_parent(collector: Collector, supervisor: Supervisor) -> None:
    """It comes over the private socket, as the queue's worker sends it."""
    private = supervisor.socket.replace("vllm.sock", "gateway.sock")
    with httpx.Client(transport=httpx.HTTPTransport(uds=private), base_url="http://gateway") as worker:
        worker.post(COMPLETIONS, json={"prompt": "x"}, headers=named("job"))
    server, (relay,) = collector.trace_of("job")
    assert (server.trace_id.hex(), relay.name) == (TRACE, "relay")
    assert attributes(server)["vllm_supervisor.job"] is True


def test_a_streams_first_event_is_in_its_span(collector: Collector, client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 3}
    client.post(COMPLETIONS, json=body, headers=named("stream") | fault(token_interval=0.25, prefill_seconds=0.1))
    server, (relay,) = collector.trace_of("stream")
    (first,) = server.events
    assert first.name == "first_byte"
    assert (first.time_unix_nano - server.start_time_unix_nano) / 1e9 > 0.09
    assert (server.end_time_unix_nano - first.time_unix_nano) / 1e9 > 0.09
    assert seconds(relay) > 0.2


def test_what_is_refused_says_why(collector: Collector, client: httpx.Client) -> None:
    client.post("/v1/nothing?a=b", json={}, headers=named("refused"))
    server, below = collector.trace_of("refused")
    found = attributes(server)
    assert (server.name, below, server.status.code) == ("POST", [], 0)  # 4xx is no error of the server's
    assert (found["http.response.status_code"], found["vllm_supervisor.code"]) == (404, "route_not_found")
    assert not {"http.route", "error.type"} & found.keys()
    client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": -1}, headers=named("bad"))
    server, below = collector.trace_of("bad")
    assert (attributes(server)["http.response.status_code"], [span.name for span in below]) == (400, ["relay"])


def test_a_secret_in_a_clients_id_is_masked_as_in_the_log(collector: Collector, client: httpx.Client) -> None:
    token = f"hf_{'abcdefghij' * 3}1234"
    client.get(f"/v1/models/{token}", headers=named(token))
    server, _ = collector.trace_of("****")
    assert attributes(server)["url.path"] == "/v1/models/****"
    assert not [raw for raw in collector.raw if token.encode() in raw]


def test_where_no_request_could_be_read_there_is_no_path(collector: Collector, supervisor: Supervisor) -> None:
    with supervisor.connect() as raw:
        raw.send(b"what is this\r\n\r\n")

        def found() -> list[dict[str, object]]:
            spans = map(attributes, collector.spans)
            return [each for each in spans if each.get("vllm_supervisor.code") == "bad_request"]

        (facts,) = wait_until(found, "its span")
    assert "url.path" not in facts
    assert facts["http.request.method"] == "_OTHER"


def test_a_client_that_goes(collector: Collector, client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 1000}
    headers = named("gone") | fault(token_interval=0.05)
    with client.stream("POST", COMPLETIONS, json=body, headers=headers) as answer:
        next(answer.iter_raw())
    server, (relay,) = collector.trace_of("gone")
    found = attributes(server)
    assert (found["vllm_supervisor.client_gone"], found["http.response.status_code"]) == (True, 200)
    assert (server.status.code, relay.name) == (0, "relay")
    with contextlib.suppress(httpx.TimeoutException):
        client.post(COMPLETIONS, json=body, headers=named("early") | fault(prefill_seconds=5.0), timeout=0.2)
    server, _ = collector.trace_of("early")
    assert attributes(server)["vllm_supervisor.client_gone"] is True
    assert "http.response.status_code" not in attributes(server)


def test_waiting_for_a_turn(collector: Collector, supervisor: Supervisor) -> None:
    body = b'{"prompt": "x"}'
    head = f'X-Fake: {{"prefill_seconds": 0.3}}\r\nContent-Length: {len(body)}'
    with RawClient(supervisor.port) as first:
        first.send(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: h\r\n{head}\r\n\r\n".encode() + body)
        wait_until(lambda: supervisor.client.get("/status").json()["in_flight"] == 1, "the first request")
        supervisor.client.post(COMPLETIONS, json={"prompt": "x"}, headers=named("second"))
    _, below = collector.trace_of("second")
    assert [span.name for span in below] == ["wait", "relay"]
    assert 0.1 < seconds(below[0]) < 2


@pytest.mark.slow
def test_held_replayed_and_cut(collector: Collector, tmp_path: Path) -> None:
    """The first is held while vLLM starts, the second one's engine dies before it answers, the third one's within."""
    plan = [{"load_seconds": 6.0, "die_after_requests": 1}, {"load_seconds": 1.0}]
    environ = collector.environ | {"FAKE_VLLM_COUNT": str(tmp_path / "n"), "OTEL_SERVICE_NAME": "mine"}
    with Supervisor("m", plan=plan, environ=environ) as supervisor:
        supervisor.says("traces go to http://127")
        assert supervisor.client.post(COMPLETIONS, json={"prompt": "x"}, headers=named("held")).status_code == 200
        server, (hold, relay) = collector.trace_of("held")
        assert (hold.name, relay.name) == ("hold", "relay")
        assert 0.2 < seconds(hold) <= seconds(server) < 15
        assert hold.end_time_unix_nano <= relay.start_time_unix_nano
        assert collector.resource["service.name"] == "mine"

        assert supervisor.client.post(COMPLETIONS, json={"prompt": "x"}, headers=named("replayed")).status_code == 200
        server, below = collector.trace_of("replayed")
        assert [span.name for span in below] == ["relay", "hold", "replay"]
        assert [attributes(span).get("error.type") for span in below] == ["engine_no_answer", None, None]
        assert [span.status.code for span in below] == [ERROR, 0, 0]
        assert seconds(below[1]) > 0.2
        assert attributes(server)["vllm_supervisor.replayed"] is True
        assert server.status.code == 0

        body = {"prompt": PROMPT, "stream": True, "max_tokens": 9}
        answer = supervisor.client.post(
            COMPLETIONS, json=body, headers=named("cut") | fault(die_after_tokens=3, how="api")
        )
        assert answer.status_code == 200
        server, (relay,) = collector.trace_of("cut")
        assert (attributes(server)["error.type"], server.status.code) == ("engine_stopped", ERROR)


# A collector that is not well


@pytest.mark.slow
def test_a_collector_that_is_not_well_keeps_nobody_waiting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    with contextlib.ExitStack() as stack:
        failing, hanging = stack.enter_context(Collector(500)), stack.enter_context(Collector(0))
        nobody = {**failing.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{closed}"}
        supervisors = [
            stack.enter_context(Supervisor("m", environ=environ))
            for environ in (nobody, failing.environ, hanging.environ)
        ]
        for supervisor in supervisors:
            supervisor.ready().says("traces go to http://127")
            for _ in range(5):
                seen = failing.posts  # before the request: its span may be delivered before its answer is read
                assert supervisor.client.post(COMPLETIONS, json={"prompt": "x"}).elapsed.total_seconds() < 1
                if supervisor is supervisors[1]:  # one export each, which all fail

                    def has_exported(seen: int = seen) -> bool:
                        return failing.posts > seen

                    wait_until(has_exported, "an export")
        supervisors[0].says("traces: Transient error .*refused")
        supervisors[1].says("traces: Failed to export spans batch code: 500")
        began = time.monotonic()
        for supervisor in supervisors:
            supervisor.signal(signal.SIGTERM)
        for supervisor in supervisors:
            assert supervisor.exit_code() == 0
            assert "Traceback" not in supervisor.output
            assert supervisor.output.count("supervisor: traces: ") + supervisor.output.count("traces: T") <= 4
        assert time.monotonic() - began < 5
        assert "the last ones were not delivered within 2 s" in supervisors[2].output


# Off


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, "http://a"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b"}, "http://b"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "console, otlp"}, "http://a"),
    ],
)
def test_the_variables_say_whether_and_where(environ: dict[str, str], found: str | None) -> None:
    assert tracing.endpoint(environ) == found


@pytest.mark.parametrize(
    ("protocol", "why"),
    [("grpc", "pip install 'opentelemetry-exporter-otlp-proto-grpc'"), ("http/json", "http/json is not spoken")],
)
def test_a_protocol_that_is_not_there(
    protocol: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc", None)
    assert tracing.set_up({"OTEL_EXPORTER_OTLP_PROTOCOL": protocol}, {}, str) is None
    (record,) = caplog.records
    assert why in record.getMessage()


def test_without_the_packages_there_are_none_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert tracing.set_up({}, {}, str) is None
    (record,) = caplog.records
    assert re.search(r"no traces: .*`pip install 'vllm-supervisor\[otel\]'` brings it", record.getMessage())
