"""Each relayed request becomes an OpenTelemetry span, with one below for each time that it was held, waited, was sent.

Spans are made once a request is over, from the times that it has noted: tracing costs nothing where it is off, and
delays no byte where it is on. The client's `traceparent` is the parent of our spans, and goes to vLLM as it came. No
query, other header or body is in a span. A thread delivers them; if a collector does not take them, the log says so
once a minute, and only the supervisor's end waits for it, for `LAST_SPANS` seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from supervisor import __version__
from supervisor.gateway.access import shown_path
from supervisor.gateway.counts import OTHER
from supervisor.gateway.record import CLIENT_GONE

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

    from supervisor.gateway.http1 import Headers
    from supervisor.gateway.record import Record

LAST_SPANS = 2.0  # seconds in which the last spans are to be delivered
TOLD_EVERY = 60.0  # seconds between two of OpenTelemetry's warnings that are logged
SERVICE = "vllm-supervisor"
PROTOCOLS = {"http/protobuf": "http", "grpc": "grpc"}
# In HTTP's semantic conventions a method that is none of these has no name of its own.
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
SPAN_NAMES = {"held": "hold", "waiting": "wait", "sent": "relay"}  # a request's mark -> the name of its span
log = logging.getLogger("supervisor.tracing")


def endpoint(environ: Mapping[str, str]) -> str | None:
    """Returns where traces are to go by OpenTelemetry's own variables; None: nowhere."""
    found = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporters = (environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")
    disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return found if not disabled and "otlp" in map(str.strip, exporters) else None


def set_up(environ: Mapping[str, str], resource: Mapping[str, str], mask: Callable[[str], str]) -> Tracing | None:
    """Is to be called in a thread: the imports take 0.3 s. Returns None, and warns, where there can be no traces."""
    asked = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = asked or "http/protobuf"
    try:
        if protocol not in PROTOCOLS:
            raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not spoken: {' or '.join(PROTOCOLS)}")
        exporter = import_module(f"opentelemetry.exporter.otlp.proto.{PROTOCOLS[protocol]}.trace_exporter")
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        ours = {"service.name": SERVICE, "service.version": __version__, **resource}
        known = Resource.create(ours).merge(OTELResourceDetector().detect())  # the user's own attributes come last
        provider = TracerProvider(resource=known, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter.OTLPSpanExporter()))
    except ImportError as error:
        package = "opentelemetry-exporter-otlp-proto-grpc" if protocol == "grpc" else f"{SERVICE}[otel]"
        log.warning("an OTLP endpoint is set, but no traces: %s. `pip install '%s'` brings it.", error, package)
        return None
    except Exception as error:  # noqa: BLE001  # whatever the user's variables say, the model is served
        log.warning("no traces: %s", error)
        return None
    logging.getLogger("opentelemetry").handlers = [_Sparing()]
    logging.getLogger("opentelemetry").propagate = False
    return Tracing(provider, mask)


class _Sparing(logging.Handler):
    """Logs little of what OpenTelemetry itself says: an exporter that fails says so several times for each batch."""

    silent_until = 0.0  # the monotonic time of the next warning that may be logged

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if record.levelno >= logging.WARNING and now >= self.silent_until:
            self.silent_until = now + TOLD_EVERY
            log.warning("traces: %s", record.getMessage())


class Tracing:
    """`request_ended(record)` is to be called for each request, and `close()` before the end."""

    def __init__(self, provider: TracerProvider, mask: Callable[[str], str]) -> None:
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self.provider = provider
        self.tracer = provider.get_tracer("supervisor.gateway", __version__)
        self.mask = mask
        self.extract = TraceContextTextMapPropagator().extract
        self.trace = trace

    def request_ended(self, record: Record) -> None:
        """Makes the spans of a request that is over: both doors call it with each one, as a watcher."""
        offset = time.time_ns() - int(record.over_at * 1e9)

        def unix(at: float) -> int:
            return offset + int(at * 1e9)

        trace, facts = self.trace, self._facts(record)
        error = trace.Status(trace.StatusCode.ERROR)
        name = f"{facts['http.request.method'].replace('_OTHER', 'HTTP')} {facts.get('http.route', '')}".rstrip()
        parent = self._parent(record.request.headers)
        span = self.tracer.start_span(name, parent, trace.SpanKind.SERVER, facts, start_time=unix(record.began))
        if not span.is_recording():
            return
        for what, since, until, lost in list_parts(record):
            part = self.tracer.start_span(what, trace.set_span_in_context(span), start_time=unix(since))
            if lost:
                part.set_attribute("error.type", "engine_no_answer")
                part.set_status(error)
            part.end(unix(until))
        if record.first_at:
            span.add_event("first_byte", timestamp=unix(record.first_at))
        if "error.type" in facts:
            span.set_status(error)
        span.end(unix(record.over_at))

    def _facts(self, record: Record) -> dict[str, Any]:
        request, status, cut = record.request, record.status, record.code
        method, route = request.method.decode("latin-1"), record.verdict.route
        failed = status >= 500 or (cut and not record.is_ours)
        facts = {
            "http.request.method": method if method in KNOWN_METHODS else "_OTHER",
            "http.route": route if route != OTHER else "",
            "http.response.status_code": status if status != CLIENT_GONE else 0,  # it is not sent to anybody
            "url.path": shown_path(self.mask, request.path).removeprefix("-"),  # a dash: it could not be read
            "url.scheme": "https" if record.door.tls else "http",
            "error.type": (cut or str(status)) if failed else "",
            "vllm_supervisor.request_id": self.mask(record.request_id.decode("latin-1")),
            "vllm_supervisor.code": cut,
            "vllm_supervisor.cache": record.cache_word,
            "vllm_supervisor.client_gone": record.client_left,
            "vllm_supervisor.replayed": record.replayed,
            "vllm_supervisor.job": record.door.private,
        }
        return {name: value for name, value in facts.items() if value}

    def _parent(self, headers: Headers) -> Context:
        """Returns the client's span by the W3C's rules: several `tracestate` are a list, several `traceparent` none."""

        def joined(wanted: bytes) -> str:
            return b",".join(value.strip() for name, value in headers if name.lower() == wanted).decode("latin-1")

        return self.extract({"traceparent": joined(b"traceparent"), "tracestate": joined(b"tracestate")})

    def close(self) -> None:
        """Delivers the spans that are left, and warns where that takes too long."""
        last = threading.Thread(target=self.provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(LAST_SPANS)
        if last.is_alive():
            log.warning("traces: the last ones were not delivered within %g s", LAST_SPANS)


def list_parts(record: Record) -> Iterator[tuple[str, float, float, bool]]:
    """Yields what became of it, in order: a span's name, its begin and end, and whether it was lost with its engine."""
    marks = (*record.marks, ("over", record.over_at))
    if record.delivery is not None and record.delivery.was_sent and marks[0][0] in ("lost", "over"):
        marks = (("sent", record.began), *marks)  # it was sent at once, which is not worth a mark
    again = False
    for (what, since), (then, until) in pairwise(marks):
        if what != "lost":
            name = "replay" if again and what == "sent" else SPAN_NAMES[what]
            yield name, max(since, record.began), max(until, record.began), then == "lost"
        again |= what == "lost"
