"""What vLLM gets of a request: one request and no more, with the body that was read, for the strictest reader.

Requests are made of odd and of common parts, read by the parser that the gateway has, and written anew; then a plain
reader, which shares no line with either, says what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import httptools
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st

from supervisor.gateway.errors import Refusal
from supervisor.gateway.heads import Memo, RepeatedHeads, split_message
from supervisor.gateway.http1 import (
    COMPRESSED,
    HOP_BY_HOP,
    Request,
    asks_for_websocket,
    origin_form,
)
from supervisor.gateway.policy import Verdict
from tests.gateway.messages import RequestReader

often = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
# What a request is routed, framed and known by stays, even where `Connection` names it: without it vLLM would read
# another request than we did.
STAYS = {b"content-encoding", b"content-length", b"expect", b"host", b"sec-websocket-protocol", b"x-forwarded-proto",
         b"x-request-id"}  # fmt: skip
ADDED = {b"connection", b"host", b"transfer-encoding", b"upgrade", b"x-forwarded-proto", b"x-request-id"}
ID = b"the-id"


@dataclass
class Parsed:
    """What the parser makes of some bytes, by the same callbacks as in the gateway."""

    url: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    heads: int = 0
    whole: int = 0

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.heads:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.heads += 1

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole += 1


def read(raw: bytes, *, tls: bool = False) -> tuple[Request, Parsed, Refusal | None] | None:
    """None where the parser takes it for no request at all."""
    parsed = Parsed()
    parser = httptools.HttpRequestParser(parsed)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError:
        return None
    if not parsed.heads:
        return None
    target = origin_form(parsed.url)
    request = Request(parser.get_method(), target, target.partition(b"?")[0], list(parsed.headers))
    version = parser.get_http_version()
    request.http11 = version == "1.1"
    request.keep_alive = request.http11 and parser.should_keep_alive()
    if parser.should_upgrade():
        request.websocket = asks_for_websocket(request.method, request.headers)
        parsed.whole = 0  # the parser stops there: of a body it says nothing
    return request, parsed, request.rewrite(version, tls=tls)


def mixed(name: str) -> st.SearchStrategy[bytes]:
    return st.sampled_from([name.encode(), name.title().encode(), name.upper().encode()])


TOKEN = st.text("abcXYZ-_.!", min_size=1, max_size=12).map(str.encode)
TEXT = st.text("ab ,;:=\t\"'\\é\xff", max_size=20).map(lambda text: text.encode("latin-1"))
# What people write, and what others try.
FIELDS_BY_NAME: dict[str, list[bytes]] = {
    "connection": [b"close", b"keep-alive", b"Upgrade", b"X-A", b"x-b, x-a", b"close, X-A ,\tx-b", b",,",
                   b"upgrade, te", b"content-length", b"host, x-request-id", b"transfer-encoding",
                   b"x-a, content-length", b"Host, x-a, transfer-encoding"],
    "content-encoding": [b"", b"identity", b"gzip", b"deflate"],
    "content-length": [b"0", b"3", b"03", b"+3", b"3, 3", b"-1", b"0x3", b"3 3", b"99999999999999999999999"],
    "expect": [b"100-continue", b"x"],
    "host": [b"x", b"", b"x:1"],
    "keep-alive": [b"timeout=5"],
    "proxy-connection": [b"keep-alive"],
    "te": [b"trailers"],
    "transfer-encoding": [b"chunked", b"Chunked", b"gzip, chunked", b"chunked, chunked", b"identity", b"gzip", b""],
    "upgrade": [b"websocket", b"WebSocket", b"h2c", b"websocket, h2c"],
    "x-forwarded-proto": [b"http", b"https"],
    "x-request-id": [b"mine", b"", b"y" * 300],
    "x-a": [b"1"],
    "x-b": [b"ength: 3", b"Content-Length: 3"],
    "sec-websocket-protocol": [b"realtime, openai-insecure-api-key.sk-1", b"openai-insecure-api-key.sk-1", b"realtime"],
}  # fmt: skip
PAIRS = st.one_of(
    *(st.tuples(mixed(name), st.sampled_from(values)) for name, values in FIELDS_BY_NAME.items()),
    *(st.tuples(mixed("connection"), st.sampled_from(FIELDS_BY_NAME["connection"])) for _ in range(3)),
    *(st.tuples(TOKEN | mixed("x-a") | mixed("x-b"), TEXT) for _ in range(5)),
    st.tuples(st.sampled_from(sorted(FIELDS_BY_NAME)).map(str.encode), TEXT),
)
PLAIN = st.tuples(
    TOKEN | st.sampled_from([b"X-Length", b"Strength", b"Accept", b"Authorization"]),
    TEXT | st.sampled_from([b"ength: 3", b"Content-Length: 3"]),
)
COLONS = st.sampled_from([*[b": "] * 12, *[b":", b":\t", b":  "] * 2, b" : "])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Of any kind."""
    method = draw(
        st.sampled_from([b"POST"] * 12 + [b"GET", b"HEAD", b"PUT", b"OPTIONS", b"DELETE", b"CONNECT", b"PATCH"])
    )
    target = draw(
        st.sampled_from(
            [b"/", b"/v1/models", b"/a?b=c#d", b"*", b"http://other/v1/x?y", b"http://other", b"//x", b"/%0d%0a"]
        )
        | TOKEN.map(lambda token: b"/" + token)
    )
    version = draw(st.sampled_from([b"1.1"] * 20 + [b"1.0"] * 3 + [b"2.0", b"0.9"]))
    fields = [(name, draw(COLONS), value) for name, value in draw(st.lists(PAIRS, max_size=4))]
    if draw(st.integers(0, 19)):
        fields.insert(draw(st.integers(0, len(fields))), (b"Host", b": ", b"x"))
    if not draw(st.integers(0, 9)):
        method = b"GET"
        fields += [(b"Connection", b": ", b"Upgrade"), (b"Upgrade", b": ", b"websocket")]
    body = draw(st.binary(max_size=6) | st.sampled_from([b"abc", b"GET / HTTP/1.1\r\n\r\n"]))
    match draw(st.integers(0, 3)):
        case 0:
            fields.insert(draw(st.integers(0, len(fields))), (b"Content-Length", b": ", b"%d" % len(body)))
        case 1:
            coding = draw(st.sampled_from([b"chunked"] * 7 + [b"gzip, chunked"]))
            fields.insert(draw(st.integers(0, len(fields))), (b"Transfer-Encoding", b": ", coding))
            body = (b"%x;a=b\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\nX-Trailer: t\r\n\r\n"
        case 2:
            body = b""
    return written(b"%b %b HTTP/%b\r\n" % (method, target, version), fields) + body


@st.composite
def common(draw: st.DrawFn) -> bytes:
    """Such as come again."""
    fields = [(name, b": ", value) for name, value in [(b"Host", b"x"), *draw(st.lists(PLAIN, max_size=4))]]
    body = b""
    if draw(st.integers(0, 3)):
        body = draw(st.binary(max_size=6))
        name = draw(st.sampled_from([b"Content-Length", b"content-length"]))
        fields.insert(draw(st.integers(0, len(fields))), (name, b": ", b"%d" % len(body)))
    return written(b"POST /v1/completions HTTP/1.1\r\n", fields) + body


def written(line: bytes, fields: list[tuple[bytes, bytes, bytes]]) -> bytes:
    return line + b"".join(b"".join(parts) + b"\r\n" for parts in fields) + b"\r\n"


def tokens(headers: list[tuple[bytes, bytes]]) -> set[bytes]:
    """What `Connection` names."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    return {token.strip().lower() for value in values for token in value.split(b",")} - {b""}


@example(b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False)
@given(raw=requests(), tls=st.booleans())
@often
def test_vllm_sees_the_request_that_was_read_and_no_other(raw: bytes, tls: bool) -> None:
    found = read(raw, tls=tls)
    assume(found is not None)
    assert found is not None
    request, parsed, refusal = found
    if not request.rewritten:
        event("refused")
        assert refusal is not None
        assert request.has_unknown_end, "where it ends nobody knows, and so nothing may be read behind it"
        return
    assert refusal in (None, COMPRESSED)
    complete = parsed.whole > 0
    body = parsed.body
    written = request.rewritten + ID + b"\r\n\r\n"
    if request.chunked:
        written += (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"0\r\n\r\n" if complete else b"")
    elif not request.websocket:
        written += body
    reader = RequestReader()
    reader.feed(written)
    event("chunked" if request.chunked else "length" if request.length else "none")
    assert len(reader.messages) == 1
    assert not reader.data
    (seen,) = reader.messages
    assert (seen.method, seen.target) == (request.method, request.target)
    assert seen.chunked == request.chunked
    codings = [value.lower() for name, value in parsed.headers if name.lower() == b"transfer-encoding"]
    assert codings in ([], [b"chunked"]), "another coding can't be passed on, and so must be refused"
    assert request.http11 or not codings, "HTTP/1.0 has none: who reads it so may see another request in the body"
    if complete:
        assert seen.whole
        assert seen.body == body
    assert seen.header(b"x-request-id") == ID
    assert seen.header(b"host") is not None
    # Whatever speaks of the connection alone is gone.
    names = {name for name, _ in seen.fields}
    hop_by_hop = names & HOP_BY_HOP
    allowed = {b"transfer-encoding"} if request.chunked else {b"connection", b"upgrade"} if request.websocket else set()
    assert hop_by_hop <= allowed
    if request.websocket:
        assert seen.whole, "it has no body"
        assert (set(seen.headers(b"connection")), set(seen.headers(b"upgrade"))) == ({b"Upgrade"}, {b"websocket"})
    assert not names & (tokens(parsed.headers) - STAYS - hop_by_hop)
    # All else is as it was, and nothing else is there.
    gone = tokens(parsed.headers) - STAYS
    kept = [
        (name.lower(), value.strip(b" \t"))
        for name, value in parsed.headers
        if name.lower() not in HOP_BY_HOP | ADDED | {b"expect", b"sec-websocket-protocol"} | gone
    ]
    assert [pair for pair in seen.fields if pair[0] not in ADDED | {b"expect", b"sec-websocket-protocol"}] == kept
    assert b"openai-insecure-api-key" not in b"".join(seen.headers(b"sec-websocket-protocol"))
    if tls:
        assert seen.header(b"x-forwarded-proto") == b"https"


@given(raw=common(), length=st.integers(0, 2000))
@often
def test_a_head_that_comes_again_is_written_as_if_it_were_read_again(raw: bytes, length: int) -> None:
    """With another length, as most do: by its halves, without the parser."""
    parts = split_message(raw)
    assume(parts is not None)
    assert parts is not None
    key, digits, body = parts
    found = read(raw)
    assume(found is not None)
    assert found is not None
    request, parsed, refusal = found
    request.verdict = Verdict(None)
    assume(refusal is None and parsed.whole == 1 and request.may_repeat())
    event("with a length" if digits else "without a length")
    repeats: RepeatedHeads[Request] = RepeatedHeads(Memo())
    assert repeats.find(raw) is None
    repeats.learn(request)
    again, other, content = b"", raw, b""
    if digits:
        again, content = b"%d" % length, b"x" * length
        place = key.lower().index(b"\r\ncontent-length: ") + len(b"\r\ncontent-length: ")
        other = key[:place] + again + key[place:] + content
    for data, expected in ((raw, (request, digits, body)), (other, (request, again, content))) * 2:
        assert repeats.find(data) == expected
    assert split_message(other) == (key, again, content)
    afresh = read(other)
    assert afresh is not None
    assert afresh[2] is None
    assert request.prefix + again + request.suffix == afresh[0].rewritten
