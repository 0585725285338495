"""HTTP/1.1 heads and framing, without a connection: what a request becomes on its way to vLLM, and an answer
on its way to the client."""

from __future__ import annotations

import copy
from enum import Enum
from typing import TYPE_CHECKING

import httptools

from supervisor.gateway.errors import Refusal, UpstreamError
from supervisor.gateway.heads import split_at_length

if TYPE_CHECKING:
    from supervisor.gateway.policy import Verdict

Headers = list[tuple[bytes, bytes]]

VERSIONS = ("1.1", "1.0")
ANSWER_START = b"HTTP/1.1 "  # every answer to a client begins with it
# A request may have so many bytes of head, headers, and bytes of target; the head of vLLM's answer, twice the bytes.
HEAD_LIMIT, HEADERS_LIMIT, TARGET_LIMIT = 32 * 1024, 100, 8 * 1024
ANSWER_HEAD_LIMIT = 64 * 1024
REQUEST_ID_LIMIT = 256  # bytes; a client's longer id is replaced
# RFC 9110, 7.6.1: these speak of one connection, not of the message.
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"})
# These header lines of a request are looked at; all others are copied without a look.
WATCHED = HOP_BY_HOP | {
    b"content-encoding", b"content-length", b"expect", b"host", b"sec-websocket-protocol", b"x-forwarded-proto",
    b"x-request-id",
}  # fmt: skip
# A page can give its WebSocket no header but Sec-WebSocket-Protocol: OpenAI's clients put the key there, too.
KEY_PROTOCOL = b"openai-insecure-api-key."
REASON_BYTES = bytes([9, *range(32, 127), *range(128, 256)])  # the reason of a status line may be made of these bytes

HEAD_TOO_LARGE = Refusal(
    431,
    f"The request's head is larger than {HEAD_LIMIT} bytes, or has more than {HEADERS_LIMIT} headers.",
    "head_too_large",
)
TARGET_TOO_LONG = Refusal(414, f"The request's target is longer than {TARGET_LIMIT} bytes.", "uri_too_long")
UNKNOWN_VERSION = Refusal(505, "HTTP/1.1 and HTTP/1.0 are spoken here.", "http_version")
UNKNOWN_CODING = Refusal(501, "Transfer-Encoding other than 'chunked' is not supported.")
NO_HOST = Refusal(400, "An HTTP/1.1 request names its Host.", "bad_request")  # RFC 9112, 3.2
TWO_HOSTS = Refusal(400, "The request has more than one Host.", "bad_request")  # RFC 9112, 3.2
CHUNKS_BEFORE_1_1 = Refusal(400, "HTTP/1.0 has no Transfer-Encoding.", "bad_request")  # RFC 9112, 6.1
FRAMES_OR_BODY = Refusal(400, "A request for a WebSocket has no body.", "bad_request")
NO_TUNNELS = Refusal(501, "CONNECT is not supported.", "bad_request")
COMPRESSED = Refusal(
    415, "vLLM reads no compressed bodies: send it without Content-Encoding.", "unsupported_content_encoding"
)


class Request:
    """Holds a request's head: what it says, and, once it is rewritten, what vLLM receives of it.

    A head that came before is shared by all requests that repeat it.
    """

    # A new head's values stand in the class: what a small request never touches costs it nothing.
    http11 = True  # whether its client speaks HTTP/1.1
    keep_alive = True  # whether another request may follow on the connection
    chunked = False  # whether the body comes in chunks
    expects_continue = False  # whether the client waits for a 100 before it sends the body
    websocket = False  # whether it asks for a WebSocket
    length: int | None = None  # bytes of the body, where the head tells that
    client_id = b""  # the X-Request-Id that its client gave it
    rewritten = b""  # the head as vLLM receives it, up to where the request's id is to follow
    prefix = suffix = b""  # `rewritten` before and after the length's digits, where the head may come again
    has_unknown_end = False  # set where nobody knows where the request ends: nothing more is read behind it
    verdict: Verdict | None = None  # the policy's, once it has judged the head

    def __init__(self, method: bytes, target: bytes, path: bytes, headers: Headers) -> None:
        self.method = method
        self.target = target
        self.path = path
        self.headers = headers
        self.is_head = method == b"HEAD"

    def header(self, name: bytes) -> bytes | None:
        """Returns the value of the first header of this name (lower case); None where there is none."""
        return next((value for other, value in self.headers if other.lower() == name), None)

    def may_repeat(self) -> bool:
        """Tells whether the head is a common one, which may be known when it comes again, and splits it then."""
        common = (
            bool(self.rewritten)
            and not (self.chunked or self.expects_continue or self.is_head or self.websocket or self.client_id)
            and self.http11
            and self.keep_alive
            and self.verdict is not None
            and self.verdict.refusal is None
            and sum(name.lower() in (b"content-length", b"x-request-id") for name, _ in self.headers) <= 1
        )
        if common:
            self.prefix, self.suffix = split_at_length(self.rewritten)
        return common

    def write_again(self, digits: bytes, request_id: bytes, body: bytes) -> bytes:
        """Returns what vLLM receives of another request with this head; `digits` are those of its length."""
        before, after = (self.prefix, self.suffix) if self.prefix else split_at_length(self.rewritten)
        return b"".join((before, digits, after, request_id, b"\r\n\r\n", body))

    def rewrite(self, version: str, *, tls: bool) -> Refusal | None:  # noqa: PLR0911  # each is a rule
        """Writes what vLLM receives. Returns a refusal where HTTP leaves no honest way for it. `tls`: it came so."""
        refusal = self._check_limits() if version in VERSIONS else UNKNOWN_VERSION
        if self.method == b"CONNECT":
            refusal = NO_TUNNELS
        if refusal is not None:
            return self.end_reading(refusal)
        lines = [self.method, b" ", self.target, b" HTTP/1.1\r\n"]
        has_host = False
        connection_options: frozenset[bytes] = frozenset()
        for name, value in self.headers:
            lower = name.lower()
            if lower not in WATCHED:
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"host":
                if has_host:
                    return self.end_reading(TWO_HOSTS)
                has_host = True
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"content-length":
                self.length = int(value)
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"x-request-id":
                if not self.client_id and 0 < len(value) <= REQUEST_ID_LIMIT:
                    self.client_id = value
            elif lower == b"transfer-encoding":
                if value.lower() != b"chunked":
                    return self.end_reading(UNKNOWN_CODING)
                if not self.http11:
                    return self.end_reading(CHUNKS_BEFORE_1_1)
                self.chunked = True
                lines.append(b"Transfer-Encoding: chunked\r\n")
            elif lower == b"expect":
                if self.http11:  # RFC 9110, 10.1.1: an HTTP/1.0 client can't wait for a 100
                    self.expects_continue = True
                    lines += (name, b": ", value, b"\r\n")
            elif lower == b"content-encoding":
                if value.lower() not in (b"", b"identity"):
                    refusal = COMPRESSED
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"x-forwarded-proto":
                if not tls:  # where TLS ends here, we know the scheme ourselves
                    lines += (name, b": ", value, b"\r\n")
            elif lower == b"sec-websocket-protocol":
                tokens = [token.strip() for token in value.split(b",")]
                if kept := b", ".join(token for token in tokens if not token.startswith(KEY_PROTOCOL)):
                    lines += (name, b": ", kept, b"\r\n")
            elif lower == b"upgrade":
                if self.websocket and value.lower() == b"websocket":
                    lines.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
            elif lower == b"connection" and value.lower() not in (b"close", b"keep-alive"):
                connection_options |= {token.strip() for token in value.lower().split(b",")} - {b""}
        if self.websocket and (self.chunked or self.length):
            return self.end_reading(FRAMES_OR_BODY)
        if not has_host:
            if self.http11:
                return self.end_reading(NO_HOST)
            lines.append(b"Host: vllm\r\n")
        if tls:  # vLLM makes its redirects of it
            lines.append(b"X-Forwarded-Proto: https\r\n")
        lines.append(b"X-Request-Id: ")
        if connection_options - WATCHED:
            lines = _drop_headers(lines, connection_options - WATCHED)
        self.rewritten = b"".join(lines)
        return refusal

    def end_reading(self, refusal: Refusal) -> Refusal:
        """Returns the refusal, and notes that nothing behind this head can be read either."""
        self.keep_alive = False
        self.has_unknown_end = True
        return refusal

    def _check_limits(self) -> Refusal | None:
        if len(self.target) > TARGET_LIMIT:
            return TARGET_TOO_LONG
        headers = self.headers
        if len(headers) > HEADERS_LIMIT or sum(len(name) + len(value) + 4 for name, value in headers) > HEAD_LIMIT:
            return HEAD_TOO_LARGE
        return None


def asks_for_websocket(method: bytes, headers: Headers) -> bool:
    return method == b"GET" and any(
        name.lower() == b"upgrade" and value.lower() == b"websocket" for name, value in headers
    )


def origin_form(target: bytes) -> bytes:
    """Returns the target as `/path?query` where it is `http://host/path?query`; any other, such as `*`, stays."""
    if target.startswith(b"/") or b"://" not in target:
        return target
    rest = target.partition(b"://")[2]
    start = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    target = rest[start:]
    return target if target.startswith(b"/") else b"/" + target


def _drop_headers(lines: list[bytes], names: frozenset[bytes]) -> list[bytes]:
    """Returns the head's lines without the headers of these names, which `Connection` has."""
    first, *others = b"".join(lines).split(b"\r\n")
    return [b"\r\n".join([first, *(line for line in others if line.partition(b":")[0].lower() not in names)])]


class Framing(Enum):
    """Says how the end of a response's body is known."""

    NONE = "no body"
    LENGTH = "content-length"
    CHUNKED = "chunked"
    CLOSE = "until the connection closes"


class ResponseHead:
    """Holds status, reason, and header lines that may travel on (hop-by-hop ones are gone). Raises UpstreamError."""

    __slots__ = ("fields", "framing", "has_request_id", "is_sse", "length", "reason", "status")

    def __init__(self, status: int, reason: bytes, headers: Headers) -> None:
        self.status = status
        self.reason = reason
        if status < 100 or reason.translate(None, REASON_BYTES):
            raise UpstreamError("vLLM's answer has no valid status line")
        self.has_request_id = False
        self.is_sse = False
        self.length = 0
        framing = Framing.CLOSE
        connection_options: frozenset[bytes] = frozenset()
        for name, value in headers:
            if len(name) == 10 and name.lower() == b"connection" and value.lower() not in (b"close", b"keep-alive"):
                connection_options |= {token.strip() for token in value.lower().split(b",")}
        lines: list[bytes] = []
        extra = {b"x-accel-buffering": b"X-Accel-Buffering: no\r\n", b"cache-control": b"Cache-Control: no-cache\r\n"}
        for name, value in headers:
            lower = name.lower()
            if lower in HOP_BY_HOP or lower in connection_options:
                if lower == b"transfer-encoding":
                    if value.lower() != b"chunked":
                        raise UpstreamError("vLLM's answer has a transfer coding other than chunked")
                    framing = Framing.CHUNKED
                continue
            if lower == b"content-length":
                framing = Framing.LENGTH
                self.length = int(value)
            elif lower == b"content-type":
                self.is_sse = value.startswith(b"text/event-stream")
            elif lower == b"x-request-id":
                self.has_request_id = True
            extra.pop(lower, None)
            lines += (name, b": ", value, b"\r\n")
        if self.is_sse:  # nginx and its kin would keep the events until they have some kilobytes
            lines += extra.values()
        self.fields = b"".join(lines)
        self.framing = Framing.NONE if status in (204, 304) or status < 200 else framing

    def copy_for_others(self) -> ResponseHead:
        """Returns a copy without what is one client's own, the request's id."""
        other = copy.copy(self)
        other.fields = b"".join(
            line for line in self.fields.splitlines(keepends=True) if not line.lower().startswith(b"x-request-id:")
        )
        other.has_request_id = False
        return other


class KnownAnswer:
    """Keeps the head of an answer with a length as clients get it: `prefix`, status first, digits, `suffix`, an id."""

    __slots__ = ("head", "prefix", "status", "suffix")

    def __init__(self, head: ResponseHead) -> None:
        self.head = head
        self.status = head.status
        written = b"HTTP/1.1 %d %b\r\n%bX-Request-Id: " % (head.status, head.reason, head.fields)
        self.prefix, self.suffix = split_at_length(written)

    def head_with_length(self, digits: bytes) -> ResponseHead:
        head = copy.copy(self.head)
        before, after = split_at_length(b"\r\n" + head.fields)
        head.fields = (before + digits + after)[2:]
        return head


class Dechunker:
    """Takes the chunk framing off a body."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.parser = httptools.HttpResponseParser(self)
        self.parser.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def feed(self, data: bytes) -> bytes:
        self.parser.feed_data(data)
        body = b"".join(self.parts)
        self.parts.clear()
        return body
