"""The cache of deterministic answers: who is answered from it, who shares a generation, and what is never kept."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from supervisor.gateway.cache import _is_deterministic
from supervisor.gateway.policy import CACHED_ROUTES, OPEN_ROUTES
from tests.harness import Supervisor, http, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESULT = "x-supervisor-cache"
CACHE = {"SUPERVISOR_RESPONSE_CACHE": "1MB"}
number = iter(range(1_000_000))


def fault(**keys: object) -> dict[str, str]:
    return {"X-Fake": json.dumps(keys)}


def same(**more: object) -> dict[str, object]:
    """A request that nobody made before, and whose answer is always the same."""
    return {"prompt": f"prompt {next(number)}", "temperature": 0, "max_tokens": 8, **more}


@pytest.fixture(scope="module")
def caching() -> Iterator[Supervisor]:
    environ = {**CACHE, "SUPERVISOR_API_KEYS": "one,two", "SUPERVISOR_ADMIN_KEYS": "admin", "MAX_MODEL_LEN": "200000"}
    with Supervisor("m", environ=environ) as supervisor:
        supervisor.client.headers["Authorization"] = "Bearer one"
        yield supervisor.ready()


def generations(supervisor: Supervisor) -> int:
    """That vLLM began, ever."""
    found = supervisor.client.get("/fake/state", headers={"Authorization": "Bearer one"}).json()
    return sum(int(found[name]) for name in ("running", "finished", "aborted"))


def ask(supervisor: Supervisor, body: object, path: str = COMPLETIONS, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return supervisor.client.post(path, json=body, headers=names)


def results(supervisor: Supervisor) -> dict[str, float]:
    text = supervisor.client.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("supervisor_cache_")]
    return {line.split()[0].removeprefix("supervisor_cache_"): float(line.split()[1]) for line in lines}


# From the cache


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("why", [{}, {"temperature": 0.7, "seed": 7}], ids=["temperature 0", "a seed"])
def test_the_second_answer_is_the_first_ones_bytes(caching: Supervisor, stream: bool, why: dict[str, object]) -> None:
    body, before = same(stream=stream, **why), generations(caching)
    first = ask(caching, body)
    second, third = ask(caching, body, X_Request_Id="mine"), ask(caching, body)
    assert generations(caching) == before + 1
    assert [answer.headers[RESULT] for answer in (first, second, third)] == ["miss", "hit", "hit"]
    assert first.status_code == second.status_code == 200
    assert first.content == second.content == third.content
    assert first.headers["content-type"] == second.headers["content-type"]
    assert second.headers["x-request-id"] == "mine" != third.headers["x-request-id"] != first.headers["x-request-id"]
    assert 0 <= int(second.headers["age"]) < 10
    assert "age" not in first.headers
    if stream:
        assert second.content.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "other",
    [{"temperature": 0.7}, {"temperature": None}, {"temperature": False}, {"seed": None, "temperature": 1}],
    ids=str,
)
def test_what_is_sampled_is_computed_each_time(caching: Supervisor, other: dict[str, object]) -> None:
    body, before = same(**other), generations(caching)
    answers = [ask(caching, body) for _ in range(2)]
    assert generations(caching) == before + 2
    assert all(RESULT not in answer.headers for answer in answers)


@pytest.mark.parametrize(
    ("body", "asked", "is_so"),
    [
        (b'{"temperature": 0}', True, True), (b'{"temperature": 0.0}', True, True), (b'{"seed": 0}', True, True),
        (b'{"temperature": false}', True, False), (b'{"seed": true}', True, False), (b'{"seed": "7"}', True, False),
        (b'{"temperature": "0"}', True, False), (b"{}", True, False), (b"{}", False, True), (b"[]", False, False),
        (b"no JSON", False, False), (b"\xff", True, False), (b"[" * 100_000, True, False), (b"", True, False),
    ],
)  # fmt: skip
def test_what_is_deterministic(body: bytes, asked: bool, is_so: bool) -> None:
    assert _is_deterministic(body, must_ask=asked) == is_so


def test_routes_without_sampling_need_no_word_of_it(caching: Supervisor) -> None:
    assert set(CACHED_ROUTES) <= set(OPEN_ROUTES)
    answers = [ask(caching, {"input": "x"}, "/v1/embeddings") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [404, 404]  # of the fake, and so not kept
    assert [answer.headers[RESULT] for answer in answers] == ["miss", "miss"]


def test_another_path_query_body_or_key_is_another_answer(caching: Supervisor) -> None:
    body = same()
    ask(caching, body)
    others = [
        ask(caching, {**body, "max_tokens": 7}),
        ask(caching, dict(reversed(body.items()))),  # the order of a tool's properties is part of the prompt
        ask(caching, body, f"{COMPLETIONS}?x=1"),
        ask(caching, body, Authorization="Bearer two"),
        ask(caching, body, Origin="http://page"),  # it is in vLLM's answer
    ]
    assert [answer.headers[RESULT] for answer in others] == ["miss"] * 5
    assert ask(caching, body).headers[RESULT] == "hit"


def test_no_cache_asks_again_and_no_store_leaves_nothing(caching: Supervisor) -> None:
    body, before = same(), generations(caching)
    ask(caching, body)
    again = [ask(caching, body, Cache_Control=value) for value in ("no-cache", "max-age=0, private")]
    assert [answer.headers[RESULT] for answer in again] == ["miss"] * 2
    assert ask(caching, body).content == again[1].content  # which is the newest
    private = same()
    assert all(RESULT not in ask(caching, private, cache_control="No-Store").headers for _ in range(2))
    assert generations(caching) == before + 5
    assert ask(caching, private).headers[RESULT] == "miss"


def test_refusals_are_not_kept(caching: Supervisor) -> None:
    body = same(max_tokens=-1)
    assert [ask(caching, body).status_code for _ in range(2)] == [400, 400]
    assert [ask(caching, body).headers[RESULT] for _ in range(2)] == ["miss", "miss"]
    assert ask(caching, same(), Authorization="Bearer wrong").status_code == 401


def test_an_administrators_change_empties_it(caching: Supervisor) -> None:
    body = same()
    ask(caching, body)
    ask(caching, {}, "/v1/load_lora_adapter", Authorization="Bearer admin")
    assert ask(caching, body).headers[RESULT] == "miss"
    ask(caching, {}, "/v1/load_lora_adapter")  # refused: nothing has changed
    assert ask(caching, body).headers[RESULT] == "hit"


def test_it_is_counted(caching: Supervisor) -> None:
    before, body = results(caching), same()
    for content in (body, body, body, same(temperature=1)):
        ask(caching, content)
    now = results(caching)
    assert {name: now[name] - before[name] for name in now if name.startswith("requests_total")} == {
        'requests_total{result="hit"}': 2, 'requests_total{result="miss"}': 1,
        'requests_total{result="shared"}': 0, 'requests_total{result="bypass"}': 1,
    }  # fmt: skip
    assert now["answers"] == before["answers"] + 1
    assert now["bytes"] > before["bytes"]


def test_each_answer_is_counted_and_logged_once(caching: Supervisor) -> None:
    def counted() -> float:
        text = caching.client.get("/metrics").text
        name = f'supervisor_requests_total{{route="{COMPLETIONS}",status="200"}} '
        return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))

    before, body = counted(), same()
    for request_id in ("once-miss", "once-hit"):
        ask(caching, body, X_Request_Id=request_id)
    assert counted() == before + 2
    caching.says(r"200 in .* B, from 127.0.0.1 \(request once-miss\)")
    caching.says(r"200 in .* B, cache hit, from 127.0.0.1 \(request once-hit\)")
    assert caching.output.count("once-miss") == 1


@pytest.mark.slow
def test_memory_is_bounded_and_the_oldest_goes() -> None:
    with Supervisor("m", environ={"SUPERVISOR_RESPONSE_CACHE": "20kB"}).ready() as supervisor:
        kept = same()
        ask(supervisor, kept)
        for _ in range(30):
            ask(supervisor, same())
            ask(supervisor, kept)  # what is asked for stays
        assert results(supervisor)["bytes"] <= 20_000
        assert 5 < results(supervisor)["answers"] < 30
        assert ask(supervisor, kept).headers[RESULT] == "hit"
        large = same(max_tokens=400, stream=True)
        assert [ask(supervisor, large).headers[RESULT] for _ in range(2)] == ["miss"] * 2
        assert ask(supervisor, kept).headers[RESULT] == "hit"  # which a large one does not push out


def test_without_the_setting_there_is_none(running: Supervisor) -> None:
    body, before = same(), results(running)
    assert all(RESULT not in ask(running, body).headers for _ in range(2))
    assert before == {}


# Bodies that come in other ways


def raw(body: bytes, *more: str, path: str = COMPLETIONS) -> bytes:
    fields = "".join(f"{line}\r\n" for line in (f"Content-Length: {len(body)}", "Authorization: Bearer one", *more))
    return f"POST {path} HTTP/1.1\r\nHost: h\r\n{fields}\r\n".encode() + body


def test_a_body_that_comes_slowly(caching: Supervisor) -> None:
    body = json.dumps(same()).encode()
    with caching.connect() as client:
        for _ in range(2):
            whole = raw(body)
            client.send(whole[: -len(body)])
            for at in range(0, len(body), 20):
                client.send(body[at : at + 20])
            answer = client.answer()
    assert (answer.status, answer.headers[RESULT]) == (200, "hit")


def test_pipelined_ones_are_answered_in_order(caching: Supervisor) -> None:
    bodies = [json.dumps(body).encode() for body in (same(), same())]
    with caching.connect() as client:
        client.send(b"".join(map(raw, [*bodies, *bodies])))
        answers = [client.answer() for _ in range(4)]
    assert [answer.headers[RESULT] for answer in answers] == ["miss", "miss", "hit", "hit"]
    assert [answers[2].body, answers[3].body] == [answers[0].body, answers[1].body]


def test_chunked_and_very_large_ones_pass_by(caching: Supervisor) -> None:
    body = json.dumps(same()).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer one\r\nTransfer-Encoding: chunked\r\n\r\n"
    with caching.connect() as client:
        answer = client.send(head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)).answer()
    assert answer.status == 200
    assert RESULT not in answer.headers
    large = caching.client.post("/v1/embeddings", content=json.dumps({"input": "x" * 2_000_000}))
    assert RESULT not in large.headers


def test_who_asks_without_reading_has_no_heap_of_answers_made_for_it(caching: Supervisor) -> None:
    body = json.dumps(same(stream=True, max_tokens=1000)).encode()
    assert len(caching.client.post(COMPLETIONS, content=body).content) > 100_000
    process = psutil.Process(caching.process.pid)
    before = process.memory_info().rss
    with caching.connect() as client:
        client.send(raw(body) * 1000)  # 200 MB, if all were answered
        first = client.until(b"\r\n\r\n")
        assert b"X-Supervisor-Cache: hit" in first
        assert caching.client.get("/ping").status_code == 200
        assert process.memory_info().rss < before + 30_000_000
        for _ in range(999):
            client.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")


# One generation for several


def together(supervisor: Supervisor, body: object, count: int, headers: dict[str, str]) -> list[httpx.Response]:
    url = f"http://127.0.0.1:{supervisor.port}{COMPLETIONS}"
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: http.post(url, json=body, headers=headers), range(count)))


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_those_who_ask_at_once_share_one_generation(caching: Supervisor, stream: bool) -> None:
    body, before = same(stream=stream, max_tokens=40), generations(caching)
    headers = {"Authorization": "Bearer one", **fault(token_interval=0.05)}
    answers = together(caching, body, 12, headers)
    assert generations(caching) == before + 1
    assert len({answer.content for answer in answers}) == 1
    assert {answer.status_code for answer in answers} == {200}
    told = sorted(answer.headers[RESULT] for answer in answers)
    assert told.count("miss") == 1  # and on a busy machine the last ones come when all is over
    assert "shared" in told
    assert len({answer.headers["x-request-id"] for answer in answers}) == 12


def streaming(supervisor: Supervisor, body: object, **headers: str) -> httpx.Response:
    """One whose first event has come."""
    client = httpx.Client(base_url=f"http://127.0.0.1:{supervisor.port}", timeout=30, verify=False)
    answer = client.send(client.build_request("POST", COMPLETIONS, json=body, headers=headers), stream=True)
    answer.extensions["mine"] = client, answer.iter_raw()
    answer.extensions["begun"] = next(answer.extensions["mine"][1])
    return answer


def rest(answer: httpx.Response) -> bytes:
    return bytes(answer.extensions["begun"]) + b"".join(answer.extensions["mine"][1])


def leave(answer: httpx.Response) -> None:
    answer.close()
    answer.extensions["mine"][0].close()


def test_who_comes_later_gets_the_beginning_too_and_who_goes_first_takes_nothing_away(caching: Supervisor) -> None:
    body = same(stream=True, max_tokens=30)
    headers = {"Authorization": "Bearer one", **fault(token_interval=0.03)}
    first = streaming(caching, body, **headers)
    second = streaming(caching, body, **headers)
    leave(first)
    whole = rest(second)
    assert whole.endswith(b"data: [DONE]\n\n")
    assert whole.startswith(first.extensions["begun"])
    assert ask(caching, body).content == whole  # and it was kept


def test_when_all_have_gone_nothing_is_computed_for_nobody(caching: Supervisor) -> None:
    body = same(stream=True, max_tokens=100_000)
    headers = {"Authorization": "Bearer one", **fault(token_interval=0.02)}
    readers = [streaming(caching, body, **headers) for _ in range(3)]
    for reader in readers:
        leave(reader)
    wait_until(lambda: caching.client.get("/fake/state").json()["running"] == 0, "vLLM's rest")
    wait_until(lambda: "supervisor_requests_in_flight 1.0" not in caching.client.get("/metrics").text, "no request")
    assert ask(caching, {**body, "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_one_that_grows_too_large_is_let_go_as_it_is_read(caching: Supervisor) -> None:
    """A quarter of the memory is 250 kB; this one has 6 MB."""
    body = same(stream=True, max_tokens=30_000)
    process = psutil.Process(caching.process.pid)
    before = process.memory_info().rss
    url, headers = f"http://127.0.0.1:{caching.port}", {"Authorization": "Bearer one"}
    with http.stream("POST", url + COMPLETIONS, json=body, headers=headers) as first:
        pieces = first.iter_raw()
        size = sum(len(next(pieces)) for _ in range(20))
        while size < 1_000_000:
            size += len(next(pieces))
        with http.stream("POST", url + COMPLETIONS, json=body, headers=headers) as second:
            assert second.headers[RESULT] == "miss"  # too late to join
        size += sum(map(len, pieces))
    assert size > 5_000_000
    assert process.memory_info().rss < before + 4_000_000
    assert ask(caching, body, Cache_Control="only-if-cached").headers[RESULT] == "miss"


@pytest.mark.slow
def test_a_reader_that_stands_still_holds_up_nobody_and_misses_nothing() -> None:
    body = json.dumps(same(stream=True, max_tokens=40_000)).encode()
    environ = {"SUPERVISOR_RESPONSE_CACHE": "100MB", "MAX_MODEL_LEN": "200000"}
    with (
        Supervisor("m", environ=environ).ready() as supervisor,
        socket.create_connection(("127.0.0.1", supervisor.port)) as slow,
    ):
        slow.sendall(raw(body, "Connection: close"))
        begun = slow.recv(100)
        quick = supervisor.client.post(COMPLETIONS, content=body)
        assert quick.headers[RESULT] == "shared"
        received = bytearray(begun)
        while data := slow.recv(1 << 20):
            received += data
    assert received.count(b"\ndata: {") == quick.content.count(b"data: {") > 30_000
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


# With an engine that comes and goes


def test_while_it_starts_those_who_ask_the_same_wait_together() -> None:
    with Supervisor("m", environ=CACHE, plan={"load_seconds": 3.0}) as supervisor:
        supervisor.says("supervisor: starting m")
        answers = together(supervisor, same(), 5, {})
        assert [answer.status_code for answer in answers] == [200] * 5
        assert generations(supervisor) == 1
        assert {answer.headers["x-supervisor-state"] for answer in answers} == {"starting"}
        supervisor.says(r"POST /v1/completions 200 .* s held \(starting\)")


def test_one_that_dies_before_the_first_byte_is_asked_again_for_all(tmp_path: Path) -> None:
    environ = {**CACHE, "FAKE_VLLM_COUNT": str(tmp_path / "n")}
    with Supervisor("m", environ=environ, plan=[{"die_after_requests": 0}, {}]).ready() as supervisor:
        answers = together(supervisor, same(), 5, {})
        assert [answer.status_code for answer in answers] == [200] * 5
        assert len({answer.content for answer in answers}) == 1
        assert supervisor.client.get("/status").json()["restarts"] == 1
        supervisor.says("200 in .*sent again, shared, from")


@pytest.mark.slow
def test_one_that_dies_in_the_midst_ends_it_well_for_all_and_nothing_is_kept(tmp_path: Path) -> None:
    environ = {**CACHE, "FAKE_VLLM_COUNT": str(tmp_path / "n")}
    with Supervisor("m", environ=environ, plan=[{"die_after_tokens": 20}, {}]).ready() as supervisor:
        body = same(stream=True, max_tokens=40)
        readers = [streaming(supervisor, body, **fault(token_interval=0.05)) for _ in range(3)]
        for reader in readers:
            whole = rest(reader)
            assert b'data: {"error":' in whole
            assert whole.endswith(b"data: [DONE]\n\n")
        wait_until(lambda: supervisor.client.get("/health").status_code == 200, "the next one")
        assert ask(supervisor, body).headers[RESULT] == "miss"


@pytest.mark.slow
def test_at_the_end_those_who_read_get_all_of_it() -> None:
    with Supervisor("m", environ=CACHE).ready() as supervisor:
        body = same(stream=True, max_tokens=20)
        readers = [streaming(supervisor, body, **fault(token_interval=0.05)) for _ in range(3)]
        supervisor.signal(signal.SIGTERM)
        assert all(rest(reader).endswith(b"data: [DONE]\n\n") for reader in readers)
        assert supervisor.exit_code() == 0


@pytest.mark.slow
def test_a_drain_that_takes_too_long_ends_each_stream_with_an_error() -> None:
    with Supervisor(
        "m", environ={**CACHE, "SUPERVISOR_DRAIN_TIMEOUT": "0.5", "MAX_MODEL_LEN": "200000"}
    ).ready() as supervisor:
        body = same(stream=True, max_tokens=100_000)
        readers = [streaming(supervisor, body, **fault(token_interval=0.05)) for _ in range(3)]
        supervisor.signal(signal.SIGTERM)
        for reader in readers:
            whole = rest(reader)
            assert b"shutting_down" in whole
            assert whole.endswith(b"data: [DONE]\n\n")
        assert supervisor.exit_code() == 128 + signal.SIGTERM


@pytest.mark.slow
def test_random_comings_and_goings_leave_nothing_behind(caching: Supervisor) -> None:
    """16 clients, few different requests, some of them given up after a moment: each that stays gets the same bytes."""
    bodies = [same(stream=bool(n % 2), max_tokens=12) for n in range(4)]
    wholes: dict[int, set[bytes]] = {n: set() for n in range(4)}
    lock = threading.Lock()

    def client(seed: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{caching.port}", timeout=30, verify=False) as http:
            for turn in range(8):
                which = (seed * 7 + turn * 3) % 4
                headers = {"Authorization": "Bearer one", **fault(token_interval=0.004)}
                if (seed + turn) % 3 == 0:
                    headers["Cache-Control"] = "no-cache"
                if (seed + turn) % 5 == 0:
                    with http.stream("POST", COMPLETIONS, json=bodies[which], headers=headers) as answer:
                        next(answer.iter_raw(), b"")
                    continue
                answer = http.post(COMPLETIONS, json=bodies[which], headers=headers)
                assert answer.status_code == 200
                with lock:
                    wholes[which].add(_timeless(answer.content))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(client, seed) for seed in range(16)]:
            done.result()
    assert {len(found) for found in wholes.values()} == {1}
    wait_until(lambda: caching.client.get("/fake/state").json()["running"] == 0, "vLLM's rest")


def _timeless(body: bytes) -> bytes:
    """Without ids and times."""
    lines: list[Any] = []
    for line in body.decode().split("\n"):
        text = line.removeprefix("data: ")
        if text.startswith("{"):
            content = json.loads(text)
            content.pop("id"), content.pop("created")
            lines.append(content)
        else:
            lines.append(text)
    return json.dumps(lines).encode()
