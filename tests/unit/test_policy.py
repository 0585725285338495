"""Who may ask for what, and how often. Pure: no sockets."""

from __future__ import annotations

import pytest

from supervisor.gateway.errors import Refusal
from supervisor.gateway.heads import REMEMBERED, Memo, RepeatedHeads, split_at_length, split_message
from supervisor.gateway.http1 import (
    COMPRESSED,
    HEAD_TOO_LARGE,
    NO_HOST,
    TARGET_TOO_LONG,
    Headers,
    Request,
)
from supervisor.gateway.policy import (
    ADMIN_ONLY,
    ADMIN_ROUTES,
    CLIENTS_LIMIT,
    MAX_FAILURES,
    OPEN_ROUTES,
    TOO_MANY_FAILURES,
    UNAUTHORIZED,
    Origins,
    Policy,
    Rate,
    Routes,
    is_preflight,
)

CHAT = b"/v1/chat/completions"
KEY = [(b"Authorization", b"Bearer one")]
ADMIN = [(b"X-API-Key", b"root")]
UNKNOWN_ROUTE = 404


def judged(policy: Policy, path: bytes, headers: Headers) -> Refusal | int | None:
    """The refusal; of a route that is none its status, for its words differ."""
    refusal = policy.judge(Request(b"POST", path, path, headers)).refusal
    return UNKNOWN_ROUTE if refusal is not None and refusal.status == UNKNOWN_ROUTE else refusal


def rewritten(
    headers: Headers, target: bytes = b"/x", *, tls: bool = False, **more: bool
) -> tuple[Request, Refusal | None]:
    request = Request(b"POST", target, target, headers)
    for name, value in more.items():
        setattr(request, name, value)
    return request, request.rewrite("1.1", tls=tls)


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ([(b"Authorization", b"Bearer one")], True),
        ([(b"authorization", b"bearer two")], True),
        ([(b"X-API-Key", b"two")], True),
        ([(b"Authorization", b"Basic one")], False),
        ([(b"Authorization", b"Bearer on")], False),
        ([(b"Authorization", b"Bearer ")], False),
        ([(b"X-API-Key", b"\xff")], False),
        ([], False),
    ],
)
def test_keys(headers: list[tuple[bytes, bytes]], passes: bool) -> None:
    assert judged(Policy(["one", "two"]), CHAT, headers) is (None if passes else UNAUTHORIZED)
    assert judged(Policy(), CHAT, headers) is None


@pytest.mark.parametrize(
    ("path", "refusal"),
    [
        (CHAT, None),
        (b"/v1/models", None),
        (b"/v1/responses/resp_1/cancel", None),
        (b"/v1/audio/transcriptions", None),
        (b"/sleep", ADMIN_ONLY),
        (b"/sleep/", ADMIN_ONLY),
        (b"/%73leep", ADMIN_ONLY),
        (b"/adapters/mine", ADMIN_ONLY),
        (b"/v1/load_lora_adapter", ADMIN_ONLY),
        (b"/inference/v1/abort_requests", ADMIN_ONLY),
        (b"/v1", UNKNOWN_ROUTE),
        (b"/v1/", UNKNOWN_ROUTE),
        (b"/v1/chat", UNKNOWN_ROUTE),
        (b"/v1/chat/completionsx", UNKNOWN_ROUTE),
        (b"/sleepy", UNKNOWN_ROUTE),
        (b"//sleep", UNKNOWN_ROUTE),
        (b"", UNKNOWN_ROUTE),
        (b"*", UNKNOWN_ROUTE),
        (b"x", UNKNOWN_ROUTE),
        (b"/\xff", UNKNOWN_ROUTE),
    ],
)
def test_routes(path: bytes, refusal: object) -> None:
    assert judged(Policy(), path, []) is refusal
    assert judged(Policy(["one"], ["root"]), path, KEY) is refusal
    assert judged(Policy(["one"], ["root"]), path, ADMIN) is None
    assert judged(Policy(["one"], ["root"]), path, []) is UNAUTHORIZED


def test_the_two_lists_are_apart() -> None:
    assert not set(OPEN_ROUTES) & set(ADMIN_ROUTES)
    assert all(route.startswith("/") and not route.endswith("/") for route in (*OPEN_ROUTES, *ADMIN_ROUTES))


def test_admin_keys_alone_leave_the_model_open() -> None:
    policy = Policy([], ["root"])
    assert judged(policy, CHAT, []) is None
    assert judged(policy, b"/sleep", []) is ADMIN_ONLY
    assert judged(policy, b"/sleep", KEY) is ADMIN_ONLY
    assert judged(policy, b"/sleep", ADMIN) is None


def test_more_routes_can_be_opened() -> None:
    routes = Routes(["/server_info", "/custom/"])
    assert routes.find(b"/server_info")[1] is None
    assert routes.find(b"/custom/x")[1] is None
    assert routes.find(b"/sleep")[1] is ADMIN_ONLY
    everything = Routes(["/"])
    assert everything.find(b"/anything")[1] is None
    assert everything.find(b"/sleep")[1] is ADMIN_ONLY  # the longer prefix decides


def test_vllms_root_path_is_taken_off() -> None:
    routes = Routes(root="/api/")
    assert routes.find(b"/api/v1/models")[1] is None
    assert routes.find(b"/api/sleep")[1] is ADMIN_ONLY
    assert routes.find(b"/v1/models")[1] is None
    unknown = routes.find(b"/apis/v1/models")[1]
    assert unknown is not None
    assert unknown.status == UNKNOWN_ROUTE


def test_rate() -> None:
    rate = Rate(60)
    assert [rate.take(b"a", 0.0) for _ in range(60)] == [None] * 60
    refusal = rate.take(b"a", 0.0)
    assert refusal is not None
    assert (refusal.status, refusal.retry_after) == (429, 1)
    assert rate.take(b"b", 0.0) is None  # another client
    assert rate.take(b"a", 0.5) is not None
    assert rate.take(b"a", 1.0) is None
    assert rate.take(b"a", 1.0) is not None
    assert all(rate.take(b"a", 1000.0) is None for _ in range(60))
    assert rate.take(b"a", 1000.0) is not None


def test_a_slow_rate_tells_how_long_to_wait() -> None:
    rate = Rate(2)
    assert rate.take(b"a", 0.0) is rate.take(b"a", 0.0) is None
    refusal = rate.take(b"a", 3.0)
    assert refusal is not None
    assert refusal.retry_after == 27


def test_rates_of_ever_new_clients_do_not_fill_the_memory() -> None:
    rate = Rate(60)
    for number in range(2 * CLIENTS_LIMIT):
        assert rate.take(b"%d" % number, number / 1000) is None
    assert len(rate.full_at) <= CLIENTS_LIMIT


def test_limits_of_a_head() -> None:
    host = (b"Host", b"h")
    assert rewritten([host, *[(b"a", b"b")] * 99])[1] is None
    assert rewritten([host, *[(b"a", b"b")] * 100])[1] is HEAD_TOO_LARGE
    assert rewritten([host, (b"a", b"b" * 33_000)])[1] is HEAD_TOO_LARGE
    assert rewritten([host], b"/" * 8193)[1] is TARGET_TOO_LONG


# Heads that come again

HEAD = b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\nX-Last: 1\r\n\r\n"
SAME = HEAD.replace(b"12", b"")


BODY = b"x" * 12
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (HEAD + BODY, (SAME, b"12", BODY)),
        (HEAD.replace(b"12", b"7") + b"x" * 7, (SAME, b"7", b"x" * 7)),
        (HEAD.replace(b"12", b"0"), (SAME, b"0", b"")),
        (HEAD.replace(b"-Length", b"-length") + BODY, (SAME.replace(b"-Length", b"-length"), b"12", BODY)),
        (HEAD.replace(b"Content-L", b"content-l") + BODY, (SAME.replace(b"Content-L", b"content-l"), b"12", BODY)),
        (GET, (GET, b"", b"")),
        # Not one whole message.
        (HEAD, None),
        (HEAD[:-1], None),
        (b"", None),
        (HEAD + BODY[:-1], None),
        (HEAD + BODY + b"y", None),
        (GET + GET, None),
        # Not a common one.
        (HEAD.replace(b"12", b"1x") + BODY, None),
        (HEAD.replace(b"12", b"-1") + BODY, None),
        (HEAD.replace(b"12", b"012") + BODY, None),
        (HEAD.replace(b"12", b"") + BODY, None),
        (HEAD.replace(b"12", b" 12") + BODY, None),
        (HEAD.replace(b"Content-Length", b"X-Length") + BODY, None),
        (b"POST / HTTP/1.1\r\nX-Content-Length: 5\r\n\r\n12345", None),
        (b"POST /?length: 5 HTTP/1.1\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 5000 + b"\r\n\r\n", None),
    ],
)
def test_split(data: bytes, expected: object) -> None:
    assert split_message(data) == expected


def test_the_latest_head_is_found_again_whatever_its_length() -> None:
    repeats: RepeatedHeads[str] = RepeatedHeads(Memo())
    assert repeats.find(HEAD + BODY) is None
    repeats.learn("it")
    for size in (12, 12, 12345, 0):
        body = b"y" * size
        assert repeats.find(HEAD.replace(b"12", b"%d" % size) + body) == ("it", b"%d" % size, body)
    for other in (
        HEAD.replace(b"X-Last", b"X-Lost") + BODY, HEAD.replace(b"12", b"") + BODY, HEAD.replace(b"12", b"1x") + BODY,
        HEAD + BODY[:-1], HEAD[:-1], b"", HEAD.replace(b"Host: h", b"Host: g") + BODY, HEAD + BODY + BODY,
        HEAD.replace(b"12", b"-2") + BODY, HEAD.replace(b"12", b"012") + BODY,
    ):  # fmt: skip
        assert repeats.find(other) is None
    assert repeats.find(HEAD + BODY) is not None
    repeats.forget()
    repeats.memo.known.clear()
    assert repeats.find(HEAD + BODY) is None


def test_what_is_no_whole_message_is_not_learnt() -> None:
    repeats: RepeatedHeads[str] = RepeatedHeads(Memo())
    assert repeats.find(HEAD + BODY) is None
    assert repeats.find(HEAD) is None
    repeats.learn("it")
    assert repeats.memo.known == {}


def test_the_memo_does_not_grow_for_ever() -> None:
    memo: Memo[int] = Memo()
    for number in range(3 * REMEMBERED):
        memo.learn(b"%d" % number, number)
    assert len(memo.known) <= REMEMBERED


def test_a_head_is_written_around_its_length() -> None:
    before, after = split_at_length(HEAD[:-2] + b"X-Request-Id: ")
    assert before + b"99" + after == HEAD.replace(b"12", b"99")[:-2] + b"X-Request-Id: "
    assert split_at_length(b"GET / HTTP/1.1\r\nHost: h\r\n") == (b"GET / HTTP/1.1\r\nHost: h\r\n", b"")


# Credentials


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ([(b"api-key", b"one")], True),  # Azure's spelling
        ([(b"Authorization", b"Bearer one"), (b"X-API-Key", b"stale")], True),
        ([(b"X-API-Key", b"stale"), (b"Authorization", b"Bearer one")], True),
        ([(b"Authorization", b"Bearer stale"), (b"X-API-Key", b"one")], True),
        ([(b"X-API-Key", b"one"), (b"Authorization", b"Bearer stale")], True),
        ([(b"X-API-Key", b"stale"), (b"X-API-Key", b"one")], True),
        ([(b"Sec-WebSocket-Protocol", b"realtime, openai-insecure-api-key.one")], True),
        ([(b"Sec-WebSocket-Protocol", b"realtime"), (b"Sec-WebSocket-Protocol", b"openai-insecure-api-key.one")], True),
        ([(b"Sec-WebSocket-Protocol", b"one")], False),
        ([(b"X-API-Key", b"stale"), (b"api-key", b"older")], False),
        ([(b"X-API-Key", b"stale")] * 20 + [(b"X-API-Key", b"one")], False),  # nobody has so many
    ],
)
def test_any_one_valid_key_suffices_in_any_order(headers: Headers, passes: bool) -> None:
    assert judged(Policy(["one"], ["root"]), CHAT, headers) is (None if passes else UNAUTHORIZED)


@pytest.mark.parametrize("headers", [[*KEY, *ADMIN], [*ADMIN, *KEY]])
def test_of_two_keys_the_administrators_counts(headers: Headers) -> None:
    verdict = Policy(["one"], ["root"]).judge(Request(b"POST", b"/sleep", b"/sleep", headers))
    assert (verdict.refusal, verdict.admin, verdict.client) == (None, True, b"root")


def test_wrong_keys_are_answered_so_often_and_a_valid_one_always() -> None:
    policy = Policy(["one"])
    wrong = policy.judge(Request(b"POST", CHAT, CHAT, []))
    told = [policy.refusal_for(wrong, b"192.0.2.1", 0.0) for _ in range(MAX_FAILURES + 2)]
    assert told == [UNAUTHORIZED] * MAX_FAILURES + [TOO_MANY_FAILURES] * 2
    assert policy.refusal_for(wrong, b"192.0.2.2", 0.0) is UNAUTHORIZED
    assert policy.refusal_for(policy.judge(Request(b"POST", CHAT, CHAT, KEY)), b"192.0.2.1", 0.0) is None
    assert policy.refusal_for(wrong, b"192.0.2.1", 60.0) is UNAUTHORIZED


@pytest.mark.parametrize(
    ("path", "near"),
    [
        (b"/v1/v1/models", "/v1/models"),
        (b"/models", "/v1/models"),
        (b"/chat/completions", "/v1/chat/completions"),
        (b"/v1/v1/chat/completions/", "/v1/chat/completions"),
        (b"/api/v1/embeddings", "/v1/embeddings"),
        (b"/api/tags", None),
        (b"/v1/files", None),
        (b"/", None),
    ],
)
def test_a_route_that_is_none_is_told_the_nearest(path: bytes, near: str | None) -> None:
    refusal = Routes().find(path)[1]
    assert refusal is not None
    assert (refusal.status, refusal.code) == (404, "route_not_found")
    assert refusal.message.endswith(f"Did you mean {near}?" if near else "SUPERVISOR_ALLOW_ROUTES opens others.")


# DNS rebinding


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        (b"localhost", True), (b"LOCALHOST:8000", True), (b"app.localhost:1", True), (b"127.0.0.1:8000", True),
        (b"127.1.2.3", True), (b"[::1]:8000", True), (b"[::1]", True), (b"192.0.2.7", True), (b"my.host", True),
        (b"a.inner.example:80", True), (b"host.docker.internal:8000", True), (b"inner.example", False),
        (b"evil.docker.internal", False), (b"evil.example", False),
        (b"127.0.0.1.evil.example", False), (b"localhost.evil.example", False), (b"", False), (b"[evil]", False),
        (b"127.0.0.1@evil.example", False), (b"xinner.example", False),
    ],
)  # fmt: skip
def test_on_loopback_without_keys_only_known_names_are_let_in(host: bytes, passes: bool) -> None:
    hosts = ["My.Host", "*.inner.example"]
    refusal = judged(Policy(hosts=hosts), CHAT, [(b"Host", host)])
    assert refusal is None or (isinstance(refusal, Refusal) and refusal.code == "host_not_allowed")
    assert (refusal is None) is passes
    assert judged(Policy(), CHAT, [(b"Host", host)]) is None
    assert judged(Policy(["one"], hosts=hosts), CHAT, [(b"Host", host), *KEY]) is None
    # Without a key the model is open where there are admin keys alone.
    assert (judged(Policy([], ["root"], hosts=hosts), CHAT, [(b"Host", host)]) is None) is passes


# What vLLM gets


def test_what_vllm_gets_of_a_head() -> None:
    headers = [
        (b"Host", b"h"), (b"Sec-WebSocket-Protocol", b"realtime, openai-insecure-api-key.one"),
        (b"X-Forwarded-Proto", b"https"), (b"Content-Encoding", b"identity"), (b"X-Other", b"1"),
    ]  # fmt: skip
    request, refusal = rewritten(headers)
    assert refusal is None
    lines = request.rewritten.split(b"\r\n")
    assert lines == [
        b"POST /x HTTP/1.1", b"Host: h", b"Sec-WebSocket-Protocol: realtime", b"X-Forwarded-Proto: https",
        b"Content-Encoding: identity", b"X-Other: 1", b"X-Request-Id: ",
    ]  # fmt: skip


@pytest.mark.parametrize("claimed", [[], [(b"x-forwarded-proto", b"http")]])
def test_where_we_end_tls_vllm_knows_it_whatever_the_client_says(claimed: Headers) -> None:
    request, _ = rewritten([(b"Host", b"h"), *claimed], tls=True)
    assert request.rewritten.lower().count(b"x-forwarded-proto") == 1
    assert b"X-Forwarded-Proto: https\r\n" in request.rewritten


def test_heads_that_are_refused() -> None:
    assert rewritten([])[1] is NO_HOST
    assert rewritten([], http11=False)[1] is None
    for coding in (b"gzip", b"zstd", b"GZIP", b"identity, gzip"):
        request, refusal = rewritten([(b"Host", b"h"), (b"Content-Encoding", coding)])
        assert refusal is COMPRESSED
        assert not request.has_unknown_end  # its body is read, and the connection goes on


# CORS

ASKED = [(b"Origin", b"http://app"), (b"Access-Control-Request-Method", b"POST")]


def test_what_a_preflight_is() -> None:
    assert is_preflight(b"OPTIONS", ASKED)
    assert not is_preflight(b"POST", ASKED)
    assert not is_preflight(b"OPTIONS", ASKED[:1])
    assert not is_preflight(b"OPTIONS", ASKED[1:])


@pytest.mark.parametrize(
    ("origins", "origin", "lines"),
    [
        (Origins(), b"http://app", b""),
        (Origins(["*"]), b"http://app", b"Access-Control-Allow-Origin: *\r\n"),
        (Origins(["*"]), None, b""),
        (Origins(["http://app"]), b"http://app", b"Access-Control-Allow-Origin: http://app\r\nVary: Origin\r\n"),
        (Origins(["http://app"]), b"http://other", b"Vary: Origin\r\n"),
        (Origins(["http://app"]), None, b"Vary: Origin\r\n"),
        (
            Origins(["*"], credentials=True),
            b"http://app",
            b"Access-Control-Allow-Origin: http://app\r\nVary: Origin\r\nAccess-Control-Allow-Credentials: true\r\n",
        ),
    ],
)
def test_what_our_own_answers_tell_a_page(origins: Origins, origin: bytes | None, lines: bytes) -> None:
    assert origins.lines(origin) == lines


def test_preflights() -> None:
    wanted = [*ASKED, (b"Access-Control-Request-Headers", b"authorization,x-any")]
    told = dict(Origins(["http://app"]).preflight(wanted) or [])
    assert told[b"access-control-allow-origin"] == b"http://app"
    assert told[b"access-control-allow-headers"] == b"authorization,x-any"
    assert b"POST" in told[b"access-control-allow-methods"]
    assert Origins(["http://other"]).preflight(wanted) is None
    assert Origins().preflight(wanted) is None
    fixed = dict(Origins(["*"], ["GET"], ["x-one"]).preflight(wanted) or [])
    assert fixed[b"access-control-allow-origin"] == b"*"
    assert fixed[b"access-control-allow-methods"] == b"GET"
    assert fixed[b"access-control-allow-headers"] == b"x-one"
