"""The gateway beside nginx: the same bytes go through both to the same upstream, and what comes out is compared.

What arrives upstream (method, target, headers, body, trailers) and what comes back to the client (interim answers,
status, reason, headers, body, trailers, and whether the connection stays) must be equal, or stand in `DIFFERENCES` with
the reason. A row there holds for the cases that it names, and for each of them it must be needed.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.engine.nginx import nginx_before
from tests.engine.recording_upstream import Part, Records, play
from tests.engine.wire import Answer, Transcript, converse
from tests.harness import Supervisor

UPSTREAM = Path(__file__).with_name("recording_upstream.py")


@dataclass
class Case:
    """`pieces` are writes, and numbers of answers that are waited for; `methods` those of the requests."""

    name: str
    pieces: list[bytes | int]
    methods: list[bytes]
    half_close: bool = False
    probes: bool = True


# The corpus


def request(
    method: bytes = b"GET",
    target: bytes = b"/x",
    *lines: bytes,
    body: bytes | None = None,
    version: bytes = b"1.1",
    host: bytes = b"Host: h\r\n",
) -> bytes:
    """`lines` are header lines without their ends; with a `body` there is a Content-Length."""
    head = b"%b %b HTTP/%b\r\n%b" % (method, target, version, host)
    head += b"".join(line if line.endswith(b"\r\n") else line + b"\r\n" for line in lines)
    return head + (b"\r\n" if body is None else b"Content-Length: %d\r\n\r\n%b" % (len(body), body))


def chunked(*chunks: bytes, ends: bytes = b"0\r\n\r\n", extension: bytes = b"") -> bytes:
    return b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks) + ends


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


METHODS = (
    b"GET POST PUT PATCH DELETE OPTIONS HEAD REPORT PROPFIND MKCOL COPY MOVE LOCK UNLOCK SEARCH PURGE LINK UNLINK "
    b"TRACE QUERY M-SEARCH BREW get Post X!#$%&'*+.^_`|~0-Y"
).split()


def methods() -> Iterator[Case]:
    for method in METHODS:
        yield Case(f"method {method.decode()}", [request(method)], [method])
    for method in (b"GET", b"DELETE", b"OPTIONS", b"HEAD"):
        yield Case(f"method {method.decode()} with a body", [request(method, body=b"body")], [method])
    for method in (b"POST", b"PUT"):
        yield Case(f"method {method.decode()} without a length", [request(method)], [method])


TARGETS = {
    "root": b"/",
    "slash escaped": b"/a%2Fb",
    "slash escaped in lower case": b"/a%2fb",
    "NUL escaped": b"/a%00b",
    "no escape": b"/a%zzb",
    "half an escape": b"/a%2",
    "percent alone": b"/a%",
    "percent in the query": b"/a?b=%zz%",
    "double slashes": b"//a//b//",
    "only slashes": b"////",
    "dot segments": b"/a/./b/../c",
    "dots escaped": b"/a/%2e%2e/c",
    "dots above the root": b"/../../etc/passwd",
    "dots at the end": b"/a/..",
    "three dots": b"/a/...",
    "UTF-8": "/über/日本".encode(),
    "bytes that are no UTF-8": b"/\xff\xfe\x80",
    "UTF-8 escaped": b"/%C3%BCber",
    "parameters": b"/a;b=c;d/e;f",
    "every sign": b"/-._~!$&'()*+,;=:@",
    "signs that belong escaped": b'/"<>\\^`{|}[]',
    "fragment": b"/a#b",
    "fragment in the query": b"/a?b#c?d",
    "long": b"/" + b"a" * 8000,
    "longer": b"/" + b"a" * 10_000,
    "many segments": b"/a" * 2000,
    "query": b"/a?b=c&d=e",
    "empty query": b"/a?",
    "two question marks": b"/a?b?c??",
    "query with every sign": b"/a?-._~!$&'()*+,;=:@/?%20%2B",
    "query of high bytes": b"/a?\xc3\xa9\xff",
    "query alone": b"/?q",
    "colon in the first segment": b"/a:80/b",
    "absolute inside": b"/http://elsewhere/a",
    "absolute": b"http://elsewhere/a?b",
    "absolute with a port": b"http://elsewhere:8080/a/b%2Fc",
    "absolute without a path": b"http://elsewhere",
    "absolute with a query alone": b"http://elsewhere?a=b",
    "absolute over TLS": b"https://elsewhere/a",
    "absolute in capitals": b"HTTP://ELSEWHERE/A",
    "absolute with a user": b"http://user:pw@elsewhere/a",
    "absolute of another scheme": b"ftp://elsewhere/a",
    "absolute with an address": b"http://[::1]:80/a",
    "asterisk": b"*",
    "no slash": b"a/b",
    "backslashes": b"\\a\\b",
}


def targets() -> Iterator[Case]:
    for name, target in TARGETS.items():
        yield Case(f"target {name}", [request(b"GET", target)], [b"GET"])
    yield Case("target asterisk of OPTIONS", [request(b"OPTIONS", b"*")], [b"OPTIONS"])
    yield Case("target CONNECT", [request(b"CONNECT", b"h:80")], [b"CONNECT"], probes=False)


HEADERS = {
    "repeated": [b"X-A: 1", b"X-B: 2", b"X-A: 3", b"x-a: 4"],
    "names' case": [b"x-lower: 1", b"X-UPPER: 2", b"X-mIxEd: 3"],
    "empty values": [b"X-Empty:", b"X-Blank: ", b"X-Tab:\t"],
    "blanks around": [b"X-A:   1", b"X-B: 2   ", b"X-C:\t3\t", b"X-D:4"],
    "blanks within": [b"X-A: a  b\tc"],
    "high bytes": [b"X-A: \xe9\xff\x80", b"X-B: \xc3\xa9"],
    "odd names": [b"X!#$%&'*+.^_`|~0: 1", b"1: 2", b"-: 3", b"_a_b: 4"],
    "underscores": [b"X_A: 1", b"X-A: 2"],
    "quotes and colons": [b'X-A: "a:b", c; d="e"', b"X-B: ::::", b"X-C: a: b"],
    "long value": [b"X-A: " + b"a" * 16_000],
    "long name": [b"X-" + b"a" * 4000 + b": 1"],
    "longer than our limit": [b"X-A: " + b"a" * 40_000],
    "as many as are allowed": [b"X-%d: %d" % (number, number) for number in range(95)],
    "too many": [b"X-%d: %d" % (number, number) for number in range(150)],
    "cookies": [b"Cookie: a=b; c=d", b"Cookie: e=f"],
    "credentials": [b"Authorization: Basic eDp5", b"Proxy-Authorization: Basic eDp5"],
    "conditions": [b'If-None-Match: "x"', b"If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT", b'If-Match: "y"'],
    "ranges": [b"Range: bytes=0-4", b'If-Range: "x"'],
    "what may come back": [b"Accept: */*", b"Accept-Encoding: gzip, br", b"Accept-Language: de", b"User-Agent: t/1"],
    "forwarded": [b"X-Forwarded-For: 1.2.3.4", b"Forwarded: for=1.2.3.4", b"Via: 1.1 x", b"X-Real-IP: 1.2.3.4"],
    "max-forwards": [b"Max-Forwards: 0"],
    "content's own": [b"Content-Type: a/b; c=d", b"Content-Encoding: x", b"Content-Language: de", b"Date: never"],
    "trailer": [b"Trailer: X-Sum"],
    "request id": [b"X-Request-Id: mine"],
    "method in a header": [b"X-HTTP-Method-Override: DELETE"],
    "connection keep-alive": [b"Connection: keep-alive"],
    "connection in capitals": [b"CONNECTION: KEEP-ALIVE"],
    "connection close": [b"Connection: close"],
    "connection Close in capitals": [b"Connection: Close"],
    "connection close in a list": [b"Connection: foo, close"],
    "connection names another": [b"Connection: keep-alive, X-Named", b"X-Named: 1", b"x-named: 2", b"X-Other: 3"],
    "connection names two": [b"Connection: X-Named", b"Connection: X-Two", b"X-Named: 1", b"X-Two: 2"],
    "connection names nobody": [b"Connection: X-Nobody"],
    "connection names Host": [b"Connection: Host, Content-Length", b"X-Other: 3"],
    "connection with empty members": [b"Connection: keep-alive, , X-Named", b"X-Named: 1"],
    "connection empty": [b"Connection:"],
    "keep-alive": [b"Keep-Alive: timeout=5"],
    "proxy-connection": [b"Proxy-Connection: keep-alive"],
    "TE": [b"TE: trailers, deflate"],
    "TE named": [b"TE: trailers", b"Connection: TE"],
    "upgrade to h2c": [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAA"],
    "upgrade not named": [b"Upgrade: h2c"],
    "expect nothing known": [b"Expect: 200-ok"],
}


def headers() -> Iterator[Case]:
    for name, lines in HEADERS.items():
        yield Case(f"header {name}", [request(b"GET", b"/x", *lines)], [b"GET"])
    hosts = {
        "none": b"",
        "empty": b"Host:\r\n",
        "two": b"Host: a\r\nHost: b\r\n",
        "two alike": b"Host: a\r\nHost: a\r\n",
        "with a port": b"Host: example.org:8000\r\n",
        "in capitals": b"HOST: EXAMPLE.org\r\n",
        "an address": b"Host: [::1]:8000\r\n",
        "odd": b"Host: a/b?c@d\r\n",
        "with blanks": b"Host: a b\r\n",
        "with high bytes": b"Host: \xc3\xa9\r\n",
    }
    for name, host in hosts.items():
        yield Case(f"host {name}", [request(host=host)], [b"GET"])
    last = b"GET /x HTTP/1.1\r\nX-A: 1\r\nHost: h\r\nX-B: 2\r\n\r\n"
    yield Case("host in the midst", [last], [b"GET"])
    yield Case("empty lines before the request", [b"\r\n\r\n" + request()], [b"GET"])


SIZES = (0, 1, 2, 1023, 1024, 4095, 4096, 16_384, 65_535, 65_536, 65_537, 300_000, 1 << 20, (1 << 20) + 1)


def bodies() -> Iterator[Case]:
    for size in SIZES:
        yield Case(f"body of {size}", [request(b"POST", body=content(size))], [b"POST"])
        whole = request(b"POST", b"/x", b"Transfer-Encoding: chunked")
        yield Case(f"body of {size} in chunks", [whole + chunked(*filter(None, [content(size)]))], [b"POST"])
    whole = request(b"POST", body=content(3000))
    yield Case("body apart from its head", [whole[:-3000], whole[-3000:]], [b"POST"])
    yield Case("body in three writes", [whole[:-2000], whole[-2000:-1], whole[-1:]], [b"POST"])
    yield Case("head in three writes", [whole[:5], whole[5:30], whole[30:]], [b"POST"])
    yield Case("head cut in its last line end", [whole[:-3001], whole[-3001:]], [b"POST"])
    yield Case("length with zeros before", [request(b"POST", b"/x", b"Content-Length: 0004") + b"body"], [b"POST"])
    yield Case("length in lower case", [request(b"POST", b"/x", b"content-length: 4") + b"body"], [b"POST"])
    yield Case("length with blanks", [request(b"POST", b"/x", b"Content-Length:  4 ") + b"body"], [b"POST"])
    yield Case("length without a blank", [request(b"POST", b"/x", b"Content-Length:4") + b"body"], [b"POST"])
    form = b"".join(
        b"--x\r\nContent-Disposition: form-data; name=%b\r\n\r\n%b\r\n" % part
        for part in ((b'"model"', b"m"), (b'"file"; filename="a.wav"', content(20_000)))
    )
    sent = request(b"POST", b"/x", b"Content-Type: multipart/form-data; boundary=x", body=form + b"--x--\r\n")
    yield Case("multipart", [sent], [b"POST"])
    squeezed = gzip.compress(b"squeezed " * 1000)
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(squeezed), squeezed)
    sent = request(b"POST", b"/x", b"Content-Encoding: gzip", b"Accept-Encoding: gzip", play(answer), body=squeezed)
    yield Case("compressed both ways", [sent], [b"POST"])
    yield Case("body that looks like a request", [request(b"POST", body=request(b"GET", b"/evil"))], [b"POST"])


def chunks() -> Iterator[Case]:
    head = request(b"POST", b"/x", b"Transfer-Encoding: chunked")
    data = content(5000)
    rows = {
        "one byte each": chunked(*(data[at : at + 1] for at in range(200))),
        "odd sizes": chunked(data[:1], data[1:4], data[4:1003], data[1003:1004], data[1004:]),
        "capital digits": b"A\r\n0123456789\r\n0\r\n\r\n",
        "zeros before the size": b"000005\r\nhello\r\n0000\r\n\r\n",
        "extensions": chunked(b"hello", b"world", extension=b";a=b;c"),
        "extension in quotes": chunked(b"hello", extension=b';a="b;c"'),
        "extension on the last": chunked(b"hello", ends=b"0;a=b\r\n\r\n"),
        "trailers": chunked(b"hello", ends=b"0\r\nX-Sum: 1\r\nx-Sum: 2\r\n\r\n"),
        "trailers that say too much": chunked(
            b"hello", ends=b"0\r\nContent-Length: 9\r\nHost: evil\r\nX-Sum: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
        ),
        "nothing": chunked(),
        "what looks like the end": chunked(b"0\r\n\r\n", b"GET /evil HTTP/1.1\r\n\r\n"),
    }
    for name, body in rows.items():
        yield Case(f"chunks {name}", [head + body], [b"POST"])
    whole = chunked(b"hello", b"world")
    yield Case("chunks apart from the head", [head, whole], [b"POST"])
    yield Case("chunks cut everywhere", [head, *(whole[at : at + 1] for at in range(len(whole)))], [b"POST"])
    capital = request(b"POST", b"/x", b"transfer-encoding: Chunked")
    yield Case("chunks in capitals", [capital + whole], [b"POST"])
    for method in (b"GET", b"DELETE", b"HEAD"):
        asked = request(method, b"/x", b"Transfer-Encoding: chunked")
        yield Case(f"chunks with {method.decode()}", [asked + whole], [method])


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TWO_CHUNKS = chunked(b"hello", b"world")


def expectations() -> Iterator[Case]:
    head = request(b"POST", b"/x", b"Expect: 100-continue", b"Content-Length: 4")
    yield Case("expect and wait", [head, 1, b"body"], [b"POST"])
    at_once = request(b"POST", b"/x", b"Expect: 100-continue", b"Content-Length: 4", play(OK)) + b"body"
    yield Case("expect and do not wait", [at_once], [b"POST"])
    asked = request(b"POST", b"/x", b"Expect: 100-continue", b"Transfer-Encoding: chunked")
    yield Case("expect with chunks", [asked, 1, TWO_CHUNKS], [b"POST"])
    refusal = b"HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno"
    asked = request(b"POST", b"/x", b"Expect: 100-continue", b"Content-Length: 4", play(refusal, at="head"))
    yield Case("expect and be refused", [asked, 1], [b"POST"], probes=False)
    old = request(b"POST", b"/x", b"Expect: 100-continue", b"Content-Length: 4", version=b"1.0")
    yield Case("expect of HTTP/1.0", [old + b"body"], [b"POST"])
    yield Case("expect without a body", [request(b"GET", b"/x", b"Expect: 100-continue")], [b"GET"])


ANSWERS = {
    "200": OK,
    "201": b"HTTP/1.1 201 Created\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n",
    "204 with a length of 0": b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    "205": b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n",
    "206": b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-1/9\r\nContent-Length: 2\r\n\r\nok",
    "301": b"HTTP/1.1 301 Moved Permanently\r\nLocation: http://elsewhere/y\r\nContent-Length: 0\r\n\r\n",
    "304": b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\n\r\n',
    "304 with a length": b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\nContent-Length: 10\r\n\r\n',
    "400": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno",
    "404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno",
    "418": b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 2\r\n\r\nno",
    "429": b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
    "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\nno",
    "503": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno",
    "599": b"HTTP/1.1 599 What\r\nContent-Length: 2\r\n\r\nno",
    "999": b"HTTP/1.1 999 What\r\nContent-Length: 2\r\n\r\nno",
    "another reason": b"HTTP/1.1 200 Fine, thanks: (really)\r\nContent-Length: 2\r\n\r\nok",
    "reason of high bytes": b"HTTP/1.1 200 \xc3\xa9\xff\r\nContent-Length: 2\r\n\r\nok",
    "empty reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
    "no reason, 404": b"HTTP/1.1 404\r\nContent-Length: 2\r\n\r\nok",
    "reason with blanks": b"HTTP/1.1 200  very   OK\r\nContent-Length: 2\r\n\r\nok",
    "cookies": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nset-cookie: c=d; Path=/\r\nX-A: 1\r\nSet-Cookie: a=e\r\n"
    b"Content-Length: 2\r\n\r\nok",
    "names' case": b"HTTP/1.1 200 OK\r\nx-lower: 1\r\nX-UPPER: 2\r\nX-mIxEd: 3\r\nCONTENT-length: 2\r\n\r\nok",
    "empty values": b"HTTP/1.1 200 OK\r\nX-Empty:\r\nX-Blank: \r\nX-A:  1 \r\nContent-Length: 2\r\n\r\nok",
    "high bytes": b"HTTP/1.1 200 OK\r\nX-A: \xe9\xff\r\nContent-Length: 2\r\n\r\nok",
    "odd names": b"HTTP/1.1 200 OK\r\nX!#$%&'*+.^_`|~0: 1\r\n_a_b: 4\r\nContent-Length: 2\r\n\r\nok",
    "long header": b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 30_000 + b"\r\nContent-Length: 2\r\n\r\nok",
    "many headers": b"HTTP/1.1 200 OK\r\n"
    + b"".join(b"X-%d: %d\r\n" % (n, n) for n in range(200))
    + b"Content-Length: 2\r\n\r\nok",
    "content's own": b"HTTP/1.1 200 OK\r\nContent-Type: a/b; c=d\r\nContent-Encoding: x\r\nContent-Language: de\r\n"
    b'ETag: W/"x"\r\nLast-Modified: Thu, 01 Jan 1970 00:00:00 GMT\r\nAccept-Ranges: bytes\r\nVary: Accept\r\n'
    b"Cache-Control: no-store\r\nExpires: 0\r\nContent-Length: 2\r\n\r\nok",
    "date and server": b"HTTP/1.1 200 OK\r\nDate: never\r\nServer: us\r\nContent-Length: 2\r\n\r\nok",
    "nginx's own words": b"HTTP/1.1 200 OK\r\nX-Accel-Buffering: no\r\nX-Accel-Expires: 1\r\n"
    b"X-Accel-Limit-Rate: 9999999\r\nX-Accel-Charset: x\r\nX-Pad: y\r\nContent-Length: 2\r\n\r\nok",
    "authenticate": b'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm="x"\r\nWWW-Authenticate: Bearer\r\n'
    b"Content-Length: 0\r\n\r\n",
    "links": b"HTTP/1.1 200 OK\r\nLink: <a>\r\nLink: <b>\r\nContent-Length: 2\r\n\r\nok",
    "connection keep-alive": b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: 5\r\n" + OK[17:],
    "connection names another": b"HTTP/1.1 200 OK\r\nConnection: X-Named\r\nX-Named: 1\r\nX-Other: 2\r\n" + OK[17:],
    "connection close": b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + OK[17:],
    "hop by hop": b"HTTP/1.1 200 OK\r\nProxy-Connection: x\r\nTE: x\r\nUpgrade: h2c\r\nTrailer: X-Sum\r\n" + OK[17:],
    "request id": b"HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\n" + OK[17:],
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.0 kept alive": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
    "length of 0": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + TWO_CHUNKS,
    "chunks in capitals": b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n" + TWO_CHUNKS,
    "chunks of one byte": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(*[b"x"] * 100),
    "chunks of 100000": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(*[content(1000) * 100] * 5),
    "no chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks with extensions": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunked(b"hello", extension=b";a=b", ends=b"0;c\r\n\r\n"),
    "chunks with trailers": b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunked(b"hello", ends=b"0\r\nX-Sum: 1\r\n\r\n"),
    "events": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunked(b"data: a\n\n", b"data: b\n\n", b"data: [DONE]\n\n"),
    "events in odd pieces": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunked(b"da", b"ta: a\n", b"\ndata: b\n\n"),
    "103": b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" + OK,
    "103 twice": b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" * 2 + OK,
    "102": b"HTTP/1.1 102 Processing\r\n\r\n" + OK,
    "100 unasked": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "more than one": OK + OK,
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nok",
    "gzip as a coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no HTTP": b"nonsense\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "folded": b"HTTP/1.1 200 OK\r\nX-A: a\r\n  b\r\nContent-Length: 2\r\n\r\nok",
    "name with a blank": b"HTTP/1.1 200 OK\r\nX-A : a\r\nContent-Length: 2\r\n\r\nok",
}
# These end with the upstream's connection.
CLOSING_ANSWERS = {
    "to the end": b"HTTP/1.1 200 OK\r\n\r\nall of it",
    "to the end, nothing": b"HTTP/1.1 200 OK\r\n\r\n",
    "with a length": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    "with a length, not said": OK,
    "in chunks, not said": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + TWO_CHUNKS,
    "in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",
    "in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
    "between chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "in the head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "HTTP/1.0 to the end": b"HTTP/1.0 200 OK\r\n\r\nall of it",
    "404 to the end": b"HTTP/1.1 404 Not Found\r\n\r\nall of it",
}
# To nginx these have no end before the connection's.
ENDING = {
    "no HTTP",
    "bare line feeds",
    "103",
    "103 twice",
    "102",
    "100 unasked",
    "two lengths",
    "bad length",
}


def answers() -> Iterator[Case]:
    for name, answer in ANSWERS.items():
        close = name in ENDING
        yield Case(f"answer {name}", [request(b"GET", b"/x", play(answer, close=close))], [b"GET"])
    for name, answer in CLOSING_ANSWERS.items():
        yield Case(f"answer closed {name}", [request(b"GET", b"/x", play(answer, close=True))], [b"GET"])
    for name in ("200", "204", "404", "chunks", "chunks with trailers", "304"):
        head = ANSWERS[name].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        yield Case(f"answer to HEAD {name}", [request(b"HEAD", b"/x", play(head))], [b"HEAD"])
    unframed = b"HTTP/1.1 200 OK\r\nX-A: 1\r\n\r\n"
    yield Case("answer to HEAD without a length", [request(b"HEAD", b"/x", play(unframed))], [b"HEAD"])
    for name in ("200", "chunks", "cookies", "103"):
        body = ANSWERS[name]
        cut = len(body) // 2
        pieces: list[Part] = [body[:cut], (body[cut:-1], 0.01), (body[-1:], 0.01)]
        asked = request(b"GET", b"/x", play(*pieces, close=name in ENDING))
        yield Case(f"answer in pieces {name}", [asked], [b"GET"])
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n"
    yield Case("answer of 1 MiB", [request(b"GET", b"/x", play(large, (content(1 << 10), 0, 1 << 10)))], [b"GET"])
    for at in ("head", 4, 70_000):
        asked = request(b"POST", b"/x", play(OK, at=at), body=content(200_000))
        yield Case(f"answer early, at {at} of the body", [asked], [b"POST"])
        asked = request(b"POST", b"/x", play(OK, at=at), b"Transfer-Encoding: chunked")
        yield Case(f"answer early, at {at} of the chunks", [asked + chunked(*[content(50_000)] * 4)], [b"POST"])
    asked = request(b"POST", b"/x", play(OK, at="head"), b"Content-Length: 10")
    yield Case("answer before the body is sent", [asked, 1, b"0123456789"], [b"POST"])
    refusal = b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno"
    asked = request(b"POST", b"/x", play(refusal, at="head", close=True), b"Content-Length: 10")
    yield Case("answer before the body, and closed", [asked, 1, b"0123456789"], [b"POST"])


def upgrades() -> Iterator[Case]:
    """`curl --http2` and Java's client offer h2c with each request, bodies and all."""
    offer = (b"Connection: Upgrade", b"Upgrade: h2c")
    posted = request(b"POST", b"/x", *offer, body=content(1000))
    yield Case("h2c with a body", [posted], [b"POST"])
    yield Case("h2c with a body in pieces", [posted[:-500], posted[-500:-100], posted[-100:]], [b"POST"])
    yield Case("h2c twice", [posted, 1, posted], [b"POST", b"POST"])
    sent = request(b"POST", b"/x", *offer, b"Transfer-Encoding: chunked", b"")
    yield Case("h2c with chunks", [sent + TWO_CHUNKS], [b"POST"])
    yield Case("h2c with chunks in pieces", [sent, TWO_CHUNKS[:4], TWO_CHUNKS[4:]], [b"POST"])
    yield Case("h2c with a request behind it", [posted + request(b"GET", b"/2")], [b"POST", b"GET"])
    yield Case("h2c behind another", [request(b"GET", b"/1") + posted], [b"GET", b"POST"])
    yield Case("h2c with an empty body", [request(b"POST", b"/x", *offer, body=b"")], [b"POST"])
    last = request(b"POST", b"/x", b"Connection: Upgrade, close", b"Upgrade: h2c", body=b"abc")
    yield Case("h2c, and closed", [last], [b"POST"])
    old = request(b"POST", b"/x", *offer, body=b"abc", version=b"1.0")
    yield Case("h2c in HTTP/1.0", [old], [b"POST"])


def versions() -> Iterator[Case]:
    yield Case("HTTP/1.0", [request(version=b"1.0")], [b"GET"])
    yield Case("HTTP/1.0 without Host", [request(version=b"1.0", host=b"")], [b"GET"])
    yield Case("HTTP/1.0 kept alive", [request(b"GET", b"/x", b"Connection: keep-alive", version=b"1.0")], [b"GET"])
    yield Case("HTTP/1.0 with a body", [request(b"POST", body=b"body", version=b"1.0")], [b"POST"])
    for name in ("chunks", "chunks with trailers", "200", "204"):
        asked = request(b"GET", b"/x", play(ANSWERS[name]), version=b"1.0")
        yield Case(f"HTTP/1.0 answered with {name}", [asked], [b"GET"])
    asked = request(b"GET", b"/x", play(CLOSING_ANSWERS["to the end"], close=True), version=b"1.0")
    yield Case("HTTP/1.0 answered to the end", [asked], [b"GET"])
    sent = request(b"POST", b"/x", b"Transfer-Encoding: chunked", version=b"1.0") + TWO_CHUNKS
    yield Case("HTTP/1.0 with chunks", [sent], [b"POST"])
    for version in (b"0.9", b"1.2", b"1.9", b"2.0", b"3.0", b"01.1", b"1.10"):
        yield Case(f"HTTP/{version.decode()}", [request(version=version)], [b"GET"])
    yield Case("HTTP/0.9 as it was", [b"GET /x\r\n\r\n"], [b"GET"], probes=False)


def connections() -> Iterator[Case]:
    for count in range(2, 6):
        row = [request(b"GET", b"/%d" % n, b"X-Marker: %d" % n) for n in range(count)]
        yield Case(f"pipelined {count}", [b"".join(row)], [b"GET"] * count)
    row = [request(b"POST", b"/%d" % n, b"X-Marker: %d" % n, body=content(n * 1000)) for n in range(5)]
    yield Case("pipelined with bodies", [b"".join(row)], [b"POST"] * 5)
    mixed = [
        request(b"POST", b"/0", b"Transfer-Encoding: chunked") + TWO_CHUNKS,
        request(b"HEAD", b"/1"),
        request(b"GET", b"/2", play((ANSWERS["chunks"], 0.05))),
        request(b"GET", b"/3", play(ANSWERS["204"])),
        request(b"POST", b"/4", body=b"end"),
    ]
    kinds = [b"POST", b"HEAD", b"GET", b"GET", b"POST"]
    yield Case("pipelined of all kinds", [b"".join(mixed)], kinds)
    whole = b"".join(mixed)
    yield Case("pipelined in odd pieces", [whole[at : at + 97] for at in range(0, len(whole), 97)], kinds)
    yield Case("pipelined, closed after the second", [
        request() + request(b"GET", b"/2", b"Connection: close") + request(b"GET", b"/3")
    ], [b"GET"] * 2)  # fmt: skip
    yield Case("pipelined behind HTTP/1.0", [request(version=b"1.0") + request(b"GET", b"/2")], [b"GET"])
    slow = request(b"GET", b"/0", play((OK, 0.05)))
    yield Case("pipelined behind a slow one", [slow + request(b"GET", b"/1") + request(b"GET", b"/2")], [b"GET"] * 3)
    closes = request(b"GET", b"/0", play(CLOSING_ANSWERS["to the end"], close=True))
    yield Case("pipelined behind one to the end", [closes + request(b"GET", b"/1")], [b"GET"])
    yield Case("one after the other", [piece for n in range(5) for piece in (mixed[n], n + 1)], kinds)
    yield Case("the same five times", [piece for n in range(5) for piece in (request(), n + 1)], [b"GET"] * 5)
    same = [request(b"POST", body=content(size)) for size in (3, 12, 3, 0, 1000)]
    yield Case("the same with other lengths", [p for n in range(5) for p in (same[n], n + 1)], [b"POST"] * 5)
    # Whether a request arrives whose client has said that it sends no more is a race: these have arrived.
    later = play(OK[:-1], (b"k", 0.1))
    yield Case("half closed", [request(b"GET", b"/x", later), -1], [b"GET"], half_close=True)
    posted = request(b"POST", b"/x", later, body=content(10_000))
    yield Case("half closed after a body", [posted, -1], [b"POST"], half_close=True)
    early = request(b"POST", b"/x", play(OK[:-1], (b"k", 0.1), at="head"), b"Content-Length: 10", b"") + b"body"
    yield Case("half closed in the body", [early, -1], [b"POST"], half_close=True)
    yield Case("half closed in the head", [request()[:-2]], [b"GET"], half_close=True)
    yield Case("half closed before anything", [b"\r\n"], [b"GET"], half_close=True)
    for name, answer in (("200", ANSWERS["200"]), ("chunks", ANSWERS["chunks"]), ("to the end", b"")):
        played = play(answer or CLOSING_ANSWERS["to the end"], close=not answer)
        yield Case(f"close asked for, {name}", [request(b"GET", b"/x", b"Connection: close", played)], [b"GET"])


CORPUS = [
    *methods(), *targets(), *headers(), *bodies(), *chunks(), *expectations(), *answers(), *versions(), *connections(),
    *upgrades(),
]  # fmt: skip


# What differs, and why


def refused_by_nginx(status: int = 400, *, end: str = "open") -> list[Difference]:
    found = [("upstream", "request", ""), ("status", "200", str(status)), ("answered by", "upstream", "nginx")]
    return [*found, ("end", "open", "closed")] if end == "open" else found


def refused_by_us(status: int) -> list[Difference]:
    found = [("upstream", "", "request"), ("status", str(status), "200"), ("answered by", "gateway", "upstream")]
    return [*found, ("end", "closed", "open")]


BAD_UPSTREAM = [("status", "502", "200"), ("answered by", "gateway", "upstream")]
EXPECT = ("header", "[('Expect', '100-continue')]", "[]")


@dataclass(frozen=True)
class Row:
    cases: tuple[str, ...]
    differences: list[Difference]
    reason: str


# What differs everywhere is left out of the comparison: X-Request-Id, which we add both ways where there is none;
# Server, Date and Connection of answers, which nginx writes itself; the place of Host, and of the headers that say
# where a body ends; a length in place of chunks, which nginx writes where it has the whole body in time.
DIFFERENCES = [
    # Requests
    Row(("method TRACE",), refused_by_nginx(405), "nginx refuses TRACE, which would show secrets that proxies add"),
    Row(("method BREW",), refused_by_us(400), "llhttp knows the registered methods alone, and so does vLLM's parser"),
    Row(
        ("target root", "target query alone", "target absolute without a path", "target absolute with a query alone"),
        [("upstream", "", "request"), ("answered by", "gateway", "upstream")],
        "`/` is a page of ours",
    ),
    Row(
        (
            "target NUL escaped",
            "target no escape",
            "target half an escape",
            "target percent alone",
            "target dots above the root",
        ),
        refused_by_nginx(),
        "nginx decodes a path to find its location; we leave that to vLLM",
    ),
    Row(
        ("target UTF-8", "target bytes that are no UTF-8", "target query of high bytes"),
        refused_by_us(400),
        "a target is of visible ASCII (RFC 9112, 3.2), and vLLM's parser is as strict",
    ),
    Row(("target longer",), refused_by_us(414), "our limit is 8 KiB, nginx's was put far away"),
    Row(
        ("target absolute with a user",), refused_by_nginx(), "nginx takes no user in a target; we drop all to the path"
    ),
    Row(
        ("target asterisk", "target asterisk of OPTIONS"),
        refused_by_nginx(),
        "nginx knows no `*`; it is vLLM's to answer",
    ),
    Row(
        ("target CONNECT",), [("status", "501", "400")], "a method that nobody knows here, not a request without sense"
    ),
    Row(
        ("header longer than our limit", "header too many"),
        refused_by_us(431),
        "our limits are 32 KiB and 100 headers, nginx's were put far away",
    ),
    Row(
        ("header connection names another",),
        [("header", "[]", "[('X-Named', '1'), ('x-named', '2')]")],
        "nginx passes on what Connection names, against RFC 9110, 7.6.1",
    ),
    Row(
        ("header connection names two",),
        [("header", "[]", "[('X-Named', '1'), ('X-Two', '2')]")],
        "nginx passes on what Connection names, against RFC 9110, 7.6.1",
    ),
    Row(
        ("header connection with empty members",),
        [("header", "[]", "[('X-Named', '1')]")],
        "nginx passes on what Connection names, against RFC 9110, 7.6.1",
    ),
    Row(
        ("header proxy-connection",),
        [("header", "[]", "[('Proxy-Connection', 'keep-alive')]")],
        "it speaks of the connection; nginx does not know it",
    ),
    Row(
        ("header upgrade to h2c",),
        [("header", "[]", "[('HTTP2-Settings', 'AAA')]")],
        "named by Connection",
    ),
    Row(
        ("header expect nothing known",),
        [("header", "[('Expect', '200-ok')]", "[]")],
        "nginx answers Expect itself, whatever it expects; ours is vLLM's to answer",
    ),
    Row(
        ("host empty", "host odd", "host with blanks"),
        refused_by_nginx(),
        "nginx chooses a server by Host; we serve all of them",
    ),
    Row(
        ("compressed both ways", "header content's own"),
        [("upstream", "", "request"), ("status", "415", "200"), ("answered by", "gateway", "upstream")],
        "vLLM reads no compressed bodies, and would say that its JSON is wrong",
    ),
    Row(
        ("answer events", "answer events in odd pieces"),
        [("answer header", "[('X-Accel-Buffering', 'no'), ('Cache-Control', 'no-cache')]", "[]")],
        "proxies before us would keep the events until they have some kilobytes",
    ),
    Row(
        ("half closed", "half closed after a body"),
        [("answers", "1", "0"), ("left over", "", "cut: 200 b'o'")],
        "nginx takes a client that says no more for one that is gone; we look whether it is",
    ),
    Row(("HTTP/1.0 without Host",), [("host", "['vllm']", "[]")], "what we send is HTTP/1.1, which needs one"),
    Row(("length with zeros before",), [("framing", "0004", "good")], "nginx writes the length anew"),
    Row(("chunks trailers",), [("trailers", "[['X-Sum', '1'], ['x-Sum', '2']]", "[]")], "nginx drops trailers"),
    Row(
        ("chunks trailers that say too much",),
        refused_by_us(400),
        "nginx drops trailers unread; llhttp takes no length in them",
    ),
    Row(("expect and wait", "expect with chunks"), [EXPECT], "nginx answers 100 itself; ours is vLLM's to answer"),
    Row(
        ("expect and do not wait",),
        [EXPECT, ("interim", "[]", "[100]")],
        "nginx answers 100 itself; to vLLM the request is complete",
    ),
    Row(
        ("expect without a body",),
        [EXPECT, ("interim", "[]", "[100]")],
        "nginx answers 100 itself; to vLLM the request is complete",
    ),
    Row(
        ("expect and be refused",),
        [("interim", "[]", "[100]"), ("end", "closed", "open")],
        "nginx answers 100 before it asks; ours has not, and nobody can tell whether the body will come",
    ),
    # Versions
    Row(("HTTP/1.0 kept alive",), [("end", "closed", "open")], "we close after each HTTP/1.0 request"),
    Row(
        ("HTTP/1.2", "HTTP/1.9", "HTTP/1.10"),
        refused_by_us(400),
        "llhttp takes no version that there is not, nginx any 1.x",
    ),
    Row(("HTTP/0.9",), [("status", "505", "400")], "we know it, and have not got it"),
    Row(
        ("HTTP/0.9 as it was",),
        [("upstream", "", "request"), ("answers", "1", "0"), ("left over", "", "cut: it: b''")],
        "nginx answers in HTTP/0.9, without a head; we say that we have not got it",
    ),
    Row(("HTTP/3.0",), [("status", "400", "505")], "to llhttp it is no HTTP"),
    # Answers
    Row(
        ("answer no reason", "answer no reason, 404"),
        [("reason", "b''", "None")],
        "the blank before the reason belongs there also without one (RFC 9112, 4)",
    ),
    Row(
        ("answer date and server",),
        [("answer date", "['never']", '["nginx\'s"]'), ("answer server", "['us']", '["nginx\'s"]')],
        "nginx writes its own; ours are vLLM's",
    ),
    Row(
        ("answer nginx's own words",),
        [
            (
                "answer header",
                "[('X-Accel-Buffering', 'no'), ('X-Accel-Expires', '1'), ('X-Accel-Limit-Rate', '9999999'),... (132)",
                "[]",
            )
        ],
        "X-Accel-... tells nginx what to do",
    ),
    Row(
        ("answer connection names another",),
        [("answer header", "[]", "[('X-Named', '1')]")],
        "nginx passes on what Connection names, against RFC 9110, 7.6.1",
    ),
    Row(
        ("answer hop by hop",),
        [("answer header", "[]", "[('Proxy-Connection', 'x'), ('TE', 'x'), ('Upgrade', 'h2c')]")],
        "nginx knows Connection and Keep-Alive alone",
    ),
    Row(("answer chunks with trailers",), [("answer trailers", "[(b'X-Sum', b'1')]", "[]")], "nginx drops trailers"),
    Row(("answer more than one",), BAD_UPSTREAM, "nginx drops what lies behind an answer; we trust neither then"),
    Row(
        ("answer two lengths",),
        [("answers", "1", "0"), ("left over", "", "cut: 200 b'ok'"), ("end", "open", "closed")],
        "nginx 1.22 believes the last length; we refuse such an answer",
    ),
    Row(
        ("answer length and chunks", "answer bad length", "answer gzip as a coding", "answer bare line feeds"),
        BAD_UPSTREAM,
        "nginx repairs what we refuse: an answer that may be read in two ways, or in none",
    ),
    Row(
        ("answer no HTTP",),
        [("answers", "1", "0"), ("left over", "", "no status line: b'nonsense'"), ("end", "open", "garbled")],
        "to nginx it is HTTP/0.9",
    ),
    Row(
        (
            "answer closed to the end",
            "answer closed to the end, nothing",
            "answer closed HTTP/1.0 to the end",
            "answer closed 404 to the end",
        ),
        [("answer framing", "close", "chunked"), ("end", "closed", "open")],
        "nginx puts such a body in chunks; ours ends as vLLM's does, by the close",
    ),
    Row(("close asked for, to the end",), [("answer framing", "close", "chunked")], "as above"),
    Row(
        ("answer closed in a chunk",),
        [("left over", "cut: 200 b'5\\r\\nhel'", "cut: 200 b'3\\r\\nhel\\r\\n'")],
        "nginx makes its own chunks; both are cut so that it is seen",
    ),
    Row(
        ("answer before the body is sent", "answer before the body, and closed"),
        [("end", "open", "closed")],
        "nginx closes when the answer comes before the body; we read the body, and go on",
    ),
    Row(
        ("pipelined behind one to the end",),
        [("upstream", "request", "request request"), ("answer framing", "close", "chunked"), ("end", "closed", "open")],
        "that one's answer ends by the close, so the second request is the client's to send again",
    ),
]


# The comparison


@dataclass
class Observed:
    seen: Transcript
    records: list[dict[str, Any]]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "request" and record["target"] != "/probe"]

    @property
    def arrived(self) -> str:
        """Of requests that were cut, some arrive in part and some not at all: these are left out."""
        return " ".join(
            record["kind"] for record in self.records if record["kind"] != "begun" and record.get("target") != "/probe"
        )


Difference = tuple[str, str, str]
# Where nginx puts its own headers is nginx's; these are compared by themselves.
FRAMING = ("content-length", "transfer-encoding")
PLACED = (*FRAMING, "content-type", "date", "server", "connection", "x-request-id")


def compare(gateway: Observed, nginx: Observed) -> list[Difference]:
    """What differs: its name, the gateway's side, nginx's side."""
    found: list[Difference] = []

    def note(name: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            found.append((name, short(ours), short(theirs)))

    note("upstream", gateway.arrived, nginx.arrived)
    for mine, other in zip(gateway.requests, nginx.requests, strict=False):
        for name in ("method", "target", "version"):
            note(name, mine[name], other[name])
        note("body", (mine["length"], mine["sha256"][:8]), (other["length"], other["sha256"][:8]))
        note("trailers", mine["trailers"], other["trailers"])
        note("host", values(mine["headers"], "host"), values(other["headers"], "host"))
        note("framing", *(framing(side["headers"], side["length"]) for side in (mine, other)))
        compare_headers("header", rest_of(mine["headers"]), rest_of(other["headers"]), note)
        given = values(other["headers"], "x-request-id")
        if given:
            note("x-request-id", values(mine["headers"], "x-request-id"), given)
    note("interim", [answer.status for answer in gateway.seen.interims], [a.status for a in nginx.seen.interims])
    note("answers", len(gateway.seen.finals), len(nginx.seen.finals))
    for mine_, other_ in zip(gateway.seen.finals, nginx.seen.finals, strict=False):
        compare_answers(mine_, other_, note)
    note("left over", gateway.seen.problem, nginx.seen.problem)
    note("end", gateway.seen.end, nginx.seen.end)
    return list(dict.fromkeys(found))


def compare_answers(ours: Answer, theirs: Answer, note: Any) -> None:
    note("status", ours.status, theirs.status)
    if is_own(ours) or is_own(theirs):  # each refuses in words of its own
        if is_own(ours) != is_own(theirs):
            note("answered by", "gateway" if is_own(ours) else "upstream", "nginx" if is_own(theirs) else "upstream")
        return
    note("reason", ours.reason, theirs.reason)
    note("answer framing", ours.framing, theirs.framing)
    note("answer body", (len(ours.body), ours.body[:40]), (len(theirs.body), theirs.body[:40]))
    assert len(ours.body) != len(theirs.body) or sha256(ours.body).digest() == sha256(theirs.body).digest()
    note("answer trailers", ours.trailers, theirs.trailers)
    mine, others = ([(n.decode("latin-1"), v.decode("latin-1")) for n, v in a.headers] for a in (ours, theirs))
    for name in ("content-length", "content-type"):
        note(f"answer {name}", values(mine, name), values(others, name))
    for name in ("date", "server"):
        if values(mine, name):
            note(f"answer {name}", values(mine, name), ["nginx's"])
    compare_headers("answer header", rest_of(mine), rest_of(others), note)
    if values(others, "x-request-id"):
        note("answer x-request-id", values(mine, "x-request-id"), values(others, "x-request-id"))


def compare_headers(name: str, ours: list[tuple[str, str]], theirs: list[tuple[str, str]], note: Any) -> None:
    only_ours = [line for line in ours if line not in theirs]
    only_theirs = [line for line in theirs if line not in ours]
    note(name, only_ours, only_theirs)
    if not only_ours and not only_theirs:
        note(f"{name} order", ours, theirs)


def framing(found: list[tuple[str, str]], length: int) -> str:
    """nginx gives a chunked body a length where it has all of it in time; the framing is then any good one."""
    lengths, codings = values(found, "content-length"), values(found, "transfer-encoding")
    if (lengths, codings) in (([], ["chunked"]), ([str(length)], [])):
        return "good"
    return " ".join(lengths + codings)


def values(found: list[tuple[str, str]], name: str) -> list[str]:
    return [value for key, value in found if key.lower() == name]


def rest_of(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in found if name.lower() not in (*PLACED, "host")]


def is_own(answer: Answer) -> bool:
    """Made by the gateway or by nginx itself."""
    return answer.body.startswith((b'{"error": {"message"', b'{"state": "')) or b"<center>nginx" in answer.body


def short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:90]}... ({len(text)})"


# The tests

# Seen or not, as the chance is, by case: each of these may be all that differs.
MAY_DIFFER = {
    # nginx sends such a request again where its connection to the upstream was a kept one.
    "answer closed in the head": [[("upstream", "request", "request request")]],
    # nginx's answer to the second request, which nobody waits for, is sometimes there in time.
    "pipelined behind one to the end": [[
        ("answer framing", "close", "chunked"), ("answers", "1", "2"), ("end", "closed", "open"),
        ("upstream", "request", "request request"),
    ]],
} | {
    # On a busy machine nginx has the answer before it has passed on the body, and then passes on no more of it. It
    # closes on the client then, or reads what is left and keeps the connection.
    f"answer early, at {at} of the {what}": [
        [("end", "open", "closed"), ("upstream", "request", "")], [("upstream", "request", "")],
    ]
    for at in ("head", 4, 70_000) for what in ("body", "chunks")
} | {
    # Before 1.23 nginx repaired them; 1.26 refuses them as we do.
    f"answer {what}": [[]] for what in ("two lengths", "length and chunks", "bad length", "gzip as a coding")
}  # fmt: skip
# What the gateway does wrong, by case, until it is mended.
KNOWN_FAULTS: dict[str, str] = {}


@pytest.fixture(scope="module")
def gateway() -> Iterator[Supervisor]:
    # Not on loopback, where only some names are let in as Host.
    environ = {"SUPERVISOR_ALLOW_ROUTES": "/", "SUPERVISOR_HOST": "0.0.0.0"}
    with Supervisor("some/model", vllm=UPSTREAM, environ=environ) as supervisor:
        yield supervisor.ready()


@pytest.fixture(scope="module")
def nginx(gateway: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of nginx in front of the same upstream."""
    with nginx_before(gateway.socket, tmp_path_factory.mktemp("nginx")) as port:
        yield port


@pytest.fixture(scope="module")
def records(gateway: Supervisor) -> Iterator[Records]:
    found = Records(gateway.socket)
    yield found
    found.close()


def marked(case: Case) -> Any:
    fault = KNOWN_FAULTS.get(case.name)
    return pytest.param(case, id=case.name, marks=[pytest.mark.xfail(strict=True, reason=fault)] if fault else [])


@pytest.mark.parametrize("case", [marked(case) for case in CORPUS])
def test_the_gateway_does_what_nginx_does(gateway: Supervisor, nginx: int, records: Records, case: Case) -> None:
    """But for what `DIFFERENCES` lists, and for each case all of that."""
    expected = [difference for row in DIFFERENCES if case.name in row.cases for difference in row.differences]
    found: list[Any] = []
    # A second look, for both keep connections to the upstream that may just have been closed: then they send again.
    for _ in range(3):
        observed = []
        records.take()
        for port in (gateway.port, nginx):
            seen = converse(port, case.pieces, case.methods, half_close=case.half_close, probes=case.probes)
            observed.append(Observed(seen, records.take()))
        found = sorted(compare(*observed))
        if found in [sorted(expected), *MAY_DIFFER.get(case.name, [])]:
            return
    assert found == sorted(expected), found


def test_the_table_speaks_of_cases_that_there_are() -> None:
    names = [case.name for case in CORPUS]
    assert len(names) == len(set(names))
    listed = [name for row in DIFFERENCES for name in row.cases]
    assert len(listed) == len(set(listed))
    assert {*listed, *KNOWN_FAULTS} <= set(names)
