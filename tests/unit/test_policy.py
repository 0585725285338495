"""Who may ask for what, and how often. Pure: no sockets."""

from __future__ import annotations

import pytest

from supervisor.gateway.heads import REMEMBERED, Latest, Memo, RequestHead, halves, split
from supervisor.gateway.policy import (
    ADMIN_ONLY,
    ADMIN_ROUTES,
    CLIENTS_LIMIT,
    HEAD_TOO_LARGE,
    OPEN_ROUTES,
    TARGET_TOO_LONG,
    UNAUTHORIZED,
    UNKNOWN_ROUTE,
    Policy,
    Rate,
    Routes,
    Verdict,
    head_limits,
)

CHAT = b"/v1/chat/completions"
KEY = [(b"Authorization", b"Bearer one")]
ADMIN = [(b"X-API-Key", b"root")]


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
    verdict = Policy(["one", "two"]).judge(CHAT, headers)
    assert verdict.refusal is (None if passes else UNAUTHORIZED)
    assert Policy().judge(CHAT, headers).refusal is None


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
    assert Policy().judge(path, []).refusal is refusal
    assert Policy(["one"], ["root"]).judge(path, KEY).refusal is refusal
    assert Policy(["one"], ["root"]).judge(path, ADMIN).refusal is None
    assert Policy(["one"], ["root"]).judge(path, []).refusal is UNAUTHORIZED
    assert Policy(["one"], ["root"]).judge(path, [], private=True).refusal is refusal  # a job


def test_the_two_lists_are_apart() -> None:
    assert not set(OPEN_ROUTES) & set(ADMIN_ROUTES)
    assert all(route.startswith("/") and not route.endswith("/") for route in (*OPEN_ROUTES, *ADMIN_ROUTES))


def test_admin_keys_alone_leave_the_model_open() -> None:
    policy = Policy([], ["root"])
    assert policy.judge(CHAT, []).refusal is None
    assert policy.judge(b"/sleep", []).refusal is ADMIN_ONLY
    assert policy.judge(b"/sleep", KEY).refusal is ADMIN_ONLY
    assert policy.judge(b"/sleep", ADMIN).refusal is None


def test_more_routes_can_be_opened() -> None:
    routes = Routes(["/server_info", "/custom/"])
    assert routes.refusal(b"/server_info") is None
    assert routes.refusal(b"/custom/x") is None
    assert routes.refusal(b"/sleep") is ADMIN_ONLY
    everything = Routes(["/"])
    assert everything.refusal(b"/anything") is None
    assert everything.refusal(b"/sleep") is ADMIN_ONLY  # the longer prefix decides


def test_vllms_root_path_is_taken_off() -> None:
    routes = Routes(root="/api/")
    assert routes.refusal(b"/api/v1/models") is None
    assert routes.refusal(b"/api/sleep") is ADMIN_ONLY
    assert routes.refusal(b"/v1/models") is None
    assert routes.refusal(b"/apis/v1/models") is UNKNOWN_ROUTE


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
    assert len(rate.buckets) <= CLIENTS_LIMIT


def test_limits_of_a_head() -> None:
    assert head_limits(b"/x", [(b"a", b"b")] * 100) is None
    assert head_limits(b"/x", [(b"a", b"b")] * 101) is HEAD_TOO_LARGE
    assert head_limits(b"/x", [(b"a", b"b" * 33_000)]) is HEAD_TOO_LARGE
    assert head_limits(b"/" * 8193, []) is TARGET_TOO_LONG


# Heads that come again

HEAD = b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\nX-Last: 1\r\n\r\n"
SAME = HEAD.replace(b"12", b"")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (HEAD, (len(HEAD), SAME, b"12")),
        (HEAD + b"x" * 12, (len(HEAD), SAME, b"12")),
        (HEAD.replace(b"12", b"7"), (len(HEAD) - 1, SAME, b"7")),
        (
            HEAD.replace(b"Content-Length", b"content-length"),
            (len(HEAD), SAME.replace(b"Content-L", b"content-l"), b"12"),
        ),
        (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", (27, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"")),
        (HEAD[:-1], None),
        (b"", None),
        (HEAD.replace(b"12", b"1x"), None),
        (HEAD.replace(b"12", b"-1"), None),
        (HEAD.replace(b"12", b"1234567890"), None),
        (HEAD.replace(b"12", b""), None),
        (HEAD.replace(b"12", b" 12"), None),
        (HEAD.replace(b"Content-Length", b"X-Length"), None),
        (b"POST / HTTP/1.1\r\nX-Content-Length: 5\r\n\r\n", None),
        (b"POST /?length: 5 HTTP/1.1\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 5000 + b"\r\n\r\n", None),
    ],
)
def test_split(data: bytes, expected: object) -> None:
    assert split(data) == expected


def test_the_latest_head_is_found_again_whatever_its_length() -> None:
    end, key, _ = split(HEAD) or (0, b"", b"")
    latest: Latest[str] = Latest(key, "it")
    assert latest.read(HEAD + b"body") == (end, b"12")
    assert latest.read(HEAD.replace(b"12", b"12345")) == (end + 3, b"12345")
    for other in (
        HEAD.replace(b"X-Last", b"X-Lost"), HEAD.replace(b"12", b""), HEAD.replace(b"12", b"1x"), HEAD[:-1], b"",
        HEAD.replace(b"12", b"1234567890"), HEAD.replace(b"Host: h", b"Host: g"), HEAD.replace(b"12", b"-2"),
    ):  # fmt: skip
        assert latest.read(other) is None


def test_the_memo_does_not_grow_for_ever() -> None:
    memo: Memo[int] = Memo()
    for number in range(3 * REMEMBERED):
        memo.learn(b"%d" % number, number)
    assert len(memo.known) <= REMEMBERED
    memo.forget()
    assert memo.known == {}


def test_a_head_is_written_around_its_length() -> None:
    head = RequestHead(b"POST", b"/v1/x", b"/v1/x", HEAD[:-2] + b"X-Request-Id: ", Verdict(None))
    assert head.before + b"99" + head.after == HEAD.replace(b"12", b"99")[:-2] + b"X-Request-Id: "
    assert halves(b"GET / HTTP/1.1\r\nHost: h\r\n") == (b"GET / HTTP/1.1\r\nHost: h\r\n", b"")
