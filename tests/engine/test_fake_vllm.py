"""The fake vLLM keeps its promises: the rest of the suite leans on it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

pytestmark = pytest.mark.slow

FAKE = Path(__file__).parents[2] / "scripts" / "fake_vllm"
PATIENCE = 10.0
HELLO = {"messages": [{"role": "user", "content": "hello you"}]}


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Poll until the condition holds, and return what it gave."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never came true: {what or condition}"
        time.sleep(0.002)
    return value


def stat_of(pid: int) -> tuple[str, int, int] | None:
    """(state, parent, session) of a process, None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1]), int(fields[3])


def stat_of_living(pid: int) -> tuple[str, int, int]:
    stat = stat_of(pid)
    assert stat is not None, f"there is no process {pid}"
    return stat


def session(sid: int) -> dict[int, str]:
    """pid -> command name of all that live in a session; zombies don't."""
    found = {}
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        stat = stat_of(pid)
        if stat and stat[2] == sid and stat[0] != "Z":
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
    return found


class Fake:
    """A fake vLLM under test, in a session of its own."""

    def __init__(self, folder: Path, *args: str, plan: object = None, **env: str) -> None:
        self.socket, self.log = folder / "fake.sock", folder / "log"
        self.socket.unlink(missing_ok=True)
        more = {"FAKE_VLLM_PLAN": json.dumps(plan)} if plan is not None else {}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, FAKE, "serve", "some/model", "--uds", self.socket, *args],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **more, **env},
            )
        self.pid = self.process.pid
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://fake", timeout=PATIENCE
        )

    def accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        client.connect(str(self.socket))
        return client

    def exchange(self, data: bytes) -> bytes:
        """Send, and read until the fake closes."""
        with self.connect() as client:
            client.sendall(data)
            return b"".join(iter(lambda: client.recv(65536), b""))

    def chat(self, fault: dict[str, Any] | None = None, **body: Any) -> httpx.Response:
        return self.http.post(
            "/v1/chat/completions", json={**HELLO, **body}, headers={"X-Fake": json.dumps(fault or {})}
        )

    def stream(self, count: int, **fault: Any) -> Any:
        body = {**HELLO, "stream": True, "max_tokens": count}
        return self.http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Fake": json.dumps(fault)})

    def raw_chat(self, version: str, **fault: Any) -> bytes:
        """A streamed chat request, as bytes."""
        body = json.dumps({**HELLO, "stream": True, "max_tokens": 4})
        head = f"POST /v1/chat/completions HTTP/{version}\r\nX-Fake: {json.dumps(fault)}\r\ncontent-length: {len(body)}"
        return f"{head}\r\n\r\n{body}".encode()

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/fake/state").json()
        return found

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def clean_up(self) -> None:
        self.http.close()
        for pid in session(self.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        until(lambda: not session(self.pid), "nothing left")


@contextmanager
def starter() -> Iterator[Callable[..., Fake]]:
    """Starts fakes, and leaves no process, socket file or segment of theirs behind."""
    folder, started = Path(tempfile.mkdtemp(prefix="fake")), list[Fake]()

    def start(*args: str, wait: bool = True, **kwargs: Any) -> Fake:
        one = Fake(folder, *args, **kwargs)
        started.append(one)
        if wait:
            until(one.accepts, "ready")
        return one

    try:
        yield start
    finally:
        for one in started:
            one.clean_up()
            # By the pids in its log: other fakes, of other tests, have their segments beside these.
            for pid in set(re.findall(r"pid=(\d+)", one.log.read_text(errors="replace"))):
                for segment in Path("/dev/shm").glob(f"psm_fake_{pid}_*"):
                    segment.unlink()
        shutil.rmtree(folder)


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    with starter() as start:
        yield start


@pytest.fixture(scope="module")
def shared() -> Iterator[Fake]:
    """One for all tests that leave it as it was."""
    with starter() as start:
        yield start()


def words(lines: list[str]) -> list[str]:
    """The contents of the events of a chat stream, without the empty ones at its ends."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    contents = [choice["delta"].get("content") for event in events for choice in event.get("choices", [])]
    return [content for content in contents if content]


def first_word(lines: Iterator[str]) -> None:
    next(line for line in lines if words([line]))


# ---- the command line


def test_version() -> None:
    assert subprocess.check_output([sys.executable, FAKE, "--version"]) == b"0.32.0\n"


def test_any_flag_is_accepted_and_few_are_honoured(fake: Callable[..., Fake]) -> None:
    one = fake("--served-model-name", "a", "b", "--max_model_len=99", "--no-enable-log", "-tp", "1", "--x", '{"y": 1}')
    cards = one.http.get("/v1/models").json()["data"]
    assert [(card["id"], card["root"], card["max_model_len"]) for card in cards] == [
        ("a", "some/model", 99),
        ("b", "some/model", 99),
    ]


def test_tcp(fake: Callable[..., Fake]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fake("--uds", "", "--host", "127.0.0.1", f"--port={port}", wait=False)

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.TransportError:
            return False

    until(answers)


def test_a_rejected_flag(fake: Callable[..., Fake]) -> None:
    one = fake("--old-flag", "3", plan={"reject_flags": ["--old-flag"]}, wait=False)
    assert one.wait() == 2
    assert one.log.read_text().endswith("vllm: error: unrecognized arguments: --old-flag\n")


@pytest.mark.parametrize("plan", [{"tokn_interval": 1}, {"shm": "x"}, {"how": "nicely"}, [1]])
def test_a_wrong_plan_is_refused(fake: Callable[..., Fake], plan: object) -> None:
    one = fake(plan=plan, wait=False)
    assert one.wait() == 2
    assert "FAKE_VLLM_PLAN" in one.log.read_text()


def test_a_stale_socket_file_is_an_error(fake: Callable[..., Fake]) -> None:
    one = fake()
    again = [sys.executable, str(FAKE), "serve", "--uds", str(one.socket)]
    done = subprocess.run(again, capture_output=True, timeout=PATIENCE, check=False)
    assert (done.returncode, b"Address already in use" in done.stderr) == (1, True)


# ---- routes


def test_plain_routes(shared: Fake) -> None:
    http = shared.http
    assert (http.get("/health").status_code, http.get("/health").content) == (200, b"")
    assert http.post("/ping").status_code == 200
    assert http.get("/version").json() == {"version": "0.32.0"}
    assert http.post("/tokenize", json={"prompt": "one two"}).json()["count"] == 2


def test_a_stream_and_a_whole_answer_say_the_same(shared: Fake) -> None:
    whole = shared.chat(max_tokens=12).json()
    with shared.stream(12) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = list(response.iter_lines())
    assert len(words(lines)) == 12
    assert "".join(words(lines)) == whole["choices"][0]["message"]["content"]
    assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}
    assert lines[-2:] == ["data: [DONE]", ""]
    assert {"naïve ", "日本 ", "🙂 "} <= set(words(lines))


def test_usage_in_the_stream(shared: Fake) -> None:
    text = shared.chat(stream=True, max_tokens=3, stream_options={"include_usage": True}).text
    assert json.loads(text.split("data: ")[-2])["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/completions", {"prompt": "x"}, "data: [DONE]"),
        ("/v1/messages", {"messages": HELLO["messages"]}, 'data: {"type":"message_stop"}'),
        ("/v1/responses", {"input": "x"}, 'data: {"type":"response.completed"'),
    ],
)
def test_other_dialects(shared: Fake, path: str, body: dict[str, Any], last: str) -> None:
    whole = shared.http.post(path, json=body)
    streamed = shared.http.post(path, json={**body, "stream": True})
    assert (whole.status_code, streamed.status_code) == (200, 200)
    assert whole.json()["usage"]
    assert last in streamed.text.strip().splitlines()[-1]


def test_the_events_of_a_response_are_numbered_and_stand_around_its_text(shared: Fake) -> None:
    whole = shared.http.post("/v1/responses", json={"input": "one two", "max_output_tokens": 3}).json()
    usage = {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}
    assert {name: whole["usage"][name] for name in usage} == usage
    text = shared.http.post("/v1/responses", json={"input": "one two", "max_output_tokens": 3, "stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * 3,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(11))
    assert "".join(event["delta"] for event in events[4:7]) == whole["output"][0]["content"][0]["text"]
    assert events[-1]["response"]["usage"] == whole["usage"]


def test_the_error_event_of_a_response_has_the_next_number(fake: Callable[..., Fake]) -> None:
    one = fake()
    body, fault = {"input": "x", "stream": True}, {"X-Fake": json.dumps({"die_after_tokens": 2})}
    text = one.http.post("/v1/responses", json=body, headers=fault).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "error"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_anthropics_tokens_are_counted(shared: Fake) -> None:
    asked = {"messages": HELLO["messages"], "system": "be brief"}
    answer = shared.http.post("/v1/messages/count_tokens", json=asked)
    assert (answer.status_code, answer.json()) == (200, {"input_tokens": 4})
    assert shared.http.post("/v1/messages/count_tokens", json={}).status_code == 400


def test_a_root_path_is_taken_off(fake: Callable[..., Fake]) -> None:
    one = fake("--root-path", "/llm")
    for path in ("/llm/v1/models", "/v1/models", "/llm/fake/status/200"):
        assert one.http.get(path).status_code == 200
    assert one.http.get("/llmv1/models").status_code == 404
    assert one.http.post("/llm/v1/completions", json={"prompt": "x"}).json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("allowed", "seen"), [('["http://a.example"]', "http://a.example"), ('["*"]', "*"), ("[]", None)]
)
def test_a_page_of_an_allowed_origin_may_read_the_answer(
    fake: Callable[..., Fake], allowed: str, seen: str | None
) -> None:
    one = fake("--allowed-origins", allowed)
    answer = one.http.get("/v1/models", headers={"Origin": "http://a.example"})
    assert answer.headers.get("access-control-allow-origin") == seen
    assert "access-control-allow-origin" not in one.http.get("/v1/models").headers


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "says"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, '"type":"BadRequestError"'),
        ("POST", "/v1/chat/completions", b"{}", 400, '"param":"messages"'),
        ("POST", "/v1/completions", b'{"prompt":"x","max_tokens":0}', 400, '"param":"max_tokens"'),
        ("POST", "/v1/completions", b'{"prompt":"x","max_tokens":99999}', 400, "maximum context length"),
        (
            "POST",
            "/v1/completions",
            b'{"prompt":"x","model":"z"}',
            404,
            '"type":"NotFoundError","param":"model","code":404',
        ),
        ("POST", "/v1/embeddings", b"{}", 404, '{"detail":"Not Found"}'),
        ("GET", "/v1/completions", b"", 405, '{"detail":"Method Not Allowed"}'),
    ],
)
def test_errors(shared: Fake, method: str, path: str, content: bytes, status: int, says: str) -> None:
    response = shared.http.request(method, path, content=content)
    assert response.status_code == status
    assert says in response.text


def test_waiting_and_running(fake: Callable[..., Fake]) -> None:
    one = fake("--max-num-seqs", "1")
    with one.stream(10_000, token_interval=0.01) as first, one.stream(1):
        lines = first.iter_lines()  # kept: httpx closes a response whose iterator is dropped
        first_word(lines)
        until(lambda: one.metric("num_requests_waiting") == 1)
        assert one.metric("num_requests_running") == 1


def test_a_client_that_goes_away_aborts_its_request(fake: Callable[..., Fake]) -> None:
    one = fake()
    with one.stream(10_000, token_interval=0.01) as response:
        lines = response.iter_lines()
        first_word(lines)
        assert one.metric("num_requests_running") == 1
    until(lambda: one.metric("num_requests_running") == 0)
    assert (one.state()["aborted"], one.state()["running"]) == (1, 0)


# ---- processes


def test_processes_are_named_and_nested_like_those_of_vllm(shared: Fake) -> None:
    state = shared.state()
    engine, worker = state["engine_pid"], state["worker_pid"]
    assert stat_of_living(engine)[1:] == (shared.pid, shared.pid)
    assert stat_of_living(worker)[1:] == (engine, shared.pid)
    assert Path(f"/proc/{engine}/cmdline").read_bytes().startswith(b"VLLM::EngineCore\0")
    assert Path(f"/proc/{worker}/cmdline").read_bytes().startswith(b"VLLM::Worker\0")


def test_bound_but_not_listening_while_loading(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"load_seconds": 2}, wait=False)
    until(one.socket.exists)
    assert not one.accepts()
    until(one.accepts)
    assert "Loading weights took" in one.log.read_text()
    until(lambda: "Application startup complete." in one.log.read_text())


def test_a_stopped_engine_stands_still_behind_a_healthy_face(shared: Fake) -> None:
    engine = shared.state()["engine_pid"]
    with shared.stream(50, token_interval=0.005) as response:
        lines = response.iter_lines()
        first_word(lines)
        os.kill(engine, signal.SIGSTOP)
        until(lambda: stat_of_living(engine)[0] == "T")
        shared.metric("generation_tokens_total")  # whatever was under way has arrived by the next look
        before = shared.metric("generation_tokens_total"), shared.metric("iteration_tokens_total_count")
        assert all(shared.http.get("/health").status_code == 200 for _ in range(30))
        assert (shared.metric("generation_tokens_total"), shared.metric("iteration_tokens_total_count")) == before
        assert shared.metric("num_requests_running") == 1
        os.kill(engine, signal.SIGCONT)
        assert "data: [DONE]" in list(lines)


def opened(one: Fake, path: str, **body: Any) -> Any:
    body = {**HELLO, "prompt": "x", "input": "x", "stream": True, "max_tokens": 5, **body}
    return one.http.stream("POST", path, json=body)


def test_the_api_server_of_a_frozen_engine_answers_what_it_can_alone(fake: Callable[..., Fake]) -> None:
    one = fake()
    with one.stream(50, freeze_after_tokens=2) as first:
        lines = first.iter_lines()
        first_word(lines)
        until(lambda: stat_of_living(one.state()["engine_pid"])[0] == "T")
        assert one.http.get("/v1/models").json()["data"][0]["id"] == "some/model"
        assert one.http.post("/v1/chat/completions", content=b"{").status_code == 400
        before = one.http.get("/metrics").text
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            with opened(one, path) as another:
                assert another.status_code == 200
        with opened(one, "/v1/responses") as another:
            events = [line for line in islice(another.iter_lines(), 4) if line.startswith("event: ")]
        assert events == ["event: response.created", "event: response.in_progress"]
        vllms = [line for line in before.splitlines() if line.startswith("vllm:")]
        after = one.http.get("/metrics").text
        assert vllms == [line for line in after.splitlines() if line.startswith("vllm:")]
        os.kill(one.state()["engine_pid"], signal.SIGCONT)
        assert "data: [DONE]" in list(lines)


def test_comments_keep_idle_streams_alive(fake: Callable[..., Fake]) -> None:
    """In those of the two OpenAI routes that have them in vLLM, and only while nothing else is said."""
    one = fake("--sse-keep-alive-interval", "1")
    with one.stream(6, token_interval=0.3) as busy:
        assert ": keep-alive" not in list(busy.iter_lines())
    with one.stream(50, freeze_after_tokens=2) as frozen, opened(one, "/v1/completions") as another:
        for response in (frozen, another):
            pieces, seen = response.iter_bytes(), b""
            while seen.count(b": keep-alive\n\n") < 2:
                seen += next(pieces)
            assert seen.endswith(b"\n\n: keep-alive\n\n: keep-alive\n\n") or seen == b": keep-alive\n\n" * 2
        request = one.http.build_request("POST", "/v1/messages", json={**HELLO, "stream": True}, timeout=1.5)
        response = one.http.send(request, stream=True)
        with pytest.raises(httpx.ReadTimeout):
            response.read()


def test_the_engine_does_not_wait_for_a_client_that_does_not_read(fake: Callable[..., Fake]) -> None:
    one = fake()
    with one.stream(8000) as response:
        until(lambda: one.metric("generation_tokens_total") == 8000)
        until(lambda: one.metric("num_requests_running") == 0)
        assert one.state()["running"] == 1  # by the API server, which has not sent it all
        assert len(words(list(response.iter_lines()))) == 8000
    assert one.state()["finished"] == 1


def test_without_its_statistics_metrics_tell_nothing_of_the_engine(fake: Callable[..., Fake]) -> None:
    one = fake("--disable-log-stats")
    assert one.chat().status_code == 200
    text = one.http.get("/metrics").text
    assert "vllm" not in text
    assert 'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"} 1.0' in text
    assert "process_cpu_seconds_total" in text


@pytest.mark.parametrize("name", ["x} y", 'a "quoted" name', "back\\slash", "x} 3\nvllm:num_requests_running 9"])
def test_any_name_can_be_a_label(fake: Callable[..., Fake], name: str) -> None:
    one = fake("--served-model-name", name)
    assert one.chat().status_code == 200

    def metrics() -> dict[str, Sample]:
        families = text_string_to_metric_families(one.http.get("/metrics").text)
        return {sample.name: sample for family in families for sample in family.samples}

    assert metrics()["vllm:generation_tokens_total"].labels["model_name"] == name
    assert metrics()["vllm:generation_tokens_total"].value == 16
    # The answer goes out before the engine has counted that it is done, as with vLLM.
    until(lambda: metrics()["vllm:num_requests_running"].value == 0)


def test_metrics_that_come_late(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"metrics_delays": [0, 0.3]})
    for delayed in (False, True, False, True):
        started = time.monotonic()
        assert one.http.get("/metrics").status_code == 200
        assert (time.monotonic() - started > 0.25) == delayed
    assert one.state()["scrapes"] == 4


def test_a_prefill_in_steps_shows_in_the_cache_alone(fake: Callable[..., Fake]) -> None:
    one = fake()
    with one.stream(1, prefill_seconds=1, prefill_steps=4) as response:
        used = set()
        while one.metric("iteration_tokens_total_count") == 0:
            used.add(round(one.metric("kv_cache_usage_perc") * 10_000))
        assert len(used & {1, 2, 3, 4}) >= 2  # a busy machine does not see each of them
        list(response.iter_lines())
    until(lambda: one.metric("kv_cache_usage_perc") == 0)


def test_a_websocket_on_which_nothing_is_said(shared: Fake) -> None:
    with shared.connect() as client:
        head = b"GET /v1/realtime HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        client.sendall(head + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 101 ")
        assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer  # RFC 6455's example
        client.sendall(b"\x81\x80\x00\x00\x00\x00")
        with pytest.raises(TimeoutError):
            client.settimeout(0.2)
            client.recv(1)
        client.sendall(b"\x88\x80\x00\x00\x00\x00")
        client.settimeout(PATIENCE)
        assert client.recv(10) == b"\x88\x00"
        assert client.recv(10) == b""
    assert shared.http.get("/v1/realtime").status_code == 404


def test_killed_engine(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"exit_delay_after_engine_death": 0.3})
    state = one.state()
    with one.stream(10_000, token_interval=0.005) as response:
        lines = response.iter_lines()
        first_word(lines)
        os.kill(state["engine_pid"], signal.SIGKILL)
        rest = [line for line in lines if line]
    assert json.loads(rest[-2][6:])["error"]["code"] == 500
    assert rest[-1] == "data: [DONE]"
    assert one.http.get("/health").status_code == 503
    assert one.chat().status_code == 500
    assert one.wait() == 0
    assert list(session(one.pid)) == [state["worker_pid"]]


def test_killed_worker_takes_the_engine_along(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"exit_delay_after_engine_death": 0.1})
    os.kill(one.state()["worker_pid"], signal.SIGKILL)
    assert one.wait() == 0
    assert session(one.pid) == {}


def test_killed_api_server_leaves_the_others_behind(fake: Callable[..., Fake]) -> None:
    one = fake()
    with pytest.raises(httpx.TransportError), one.stream(10_000, token_interval=0.001) as response:
        lines = response.iter_lines()
        first_word(lines)
        os.kill(one.pid, signal.SIGKILL)
        list(lines)
    assert one.wait() == -9
    assert "Traceback" not in one.log.read_text()
    until(lambda: sorted(session(one.pid).values()) == ["VLLM::EngineCor", "VLLM::Worker"])


# Several machines


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(port: str, rank: int) -> list[str]:
    place = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", port]
    return [*place, "--headless"] if rank else place


def says(one: Fake, text: str) -> bool:
    return text in one.log.read_text()


def test_ranks_wait_for_each_other_and_then_for_nobody(fake: Callable[..., Fake], tmp_path: Path) -> None:
    """Rank 1 is gone, and nothing of rank 0 takes notice: so does the real one."""
    port, folder = free_port(), tmp_path / "other"
    folder.mkdir()
    first = fake(*ranks(port, 0), wait=False)
    until(lambda: says(first, f"world_size=2 rank=0 local_rank=0 distributed_init_method=tcp://127.0.0.1:{port}"))
    assert not first.accepts()
    other = Fake(folder, *ranks(port, 1))
    try:
        until(first.accepts, "ready")
        until(lambda: says(other, "GiB for KV cache on node"), "loaded")
        assert says(first, "rank 0 in world size 2 is assigned as")
        assert says(other, f"headless multiproc executor, with head node address 127.0.0.1:{port}")
        assert says(other, "rank 1 in world size 2 is assigned as")
        assert not other.accepts()  # it serves nobody
        worker = next(pid for pid, name in session(other.pid).items() if name.startswith("VLLM::Worker_TP"))
        os.kill(worker, signal.SIGKILL)
        assert other.wait() == 0
        assert says(other, "died unexpectedly (exit code: -9)")
        assert first.http.get("/health").status_code == 200
        assert first.chat(max_tokens=2).status_code == 200
    finally:
        other.clean_up()


def test_a_rank_waits_for_rank_0_and_loses_it_while_it_gathers(fake: Callable[..., Fake]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = str(first.getsockname()[1])
    alone = fake(*ranks(port, 1), wait=False)
    until(lambda: says(alone, "world_size=2 rank=1"))
    with socket.create_server(("127.0.0.1", int(port))) as first:
        first.accept()[0].close()
        assert alone.wait() == 1
    assert says(alone, "Connection closed by peer [127.0.0.1]")


def test_a_worker_with_a_helper_of_the_same_name(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"worker_helper": True})
    workers = until(
        lambda: [pid for pid, name in session(one.pid).items() if name == "VLLM::Worker"][1:] and session(one.pid)
    )
    worker = one.state()["worker_pid"]
    helper = next(pid for pid, name in workers.items() if name == "VLLM::Worker" and pid != worker)
    assert stat_of(helper)[1] == worker  # type: ignore[index]
    os.kill(helper, signal.SIGKILL)
    until(lambda: stat_of(helper) is None, "reaped")
    assert one.chat(max_tokens=2).status_code == 200


def test_sigterm_ends_streams_and_leaves_only_the_socket_file(fake: Callable[..., Fake]) -> None:
    one = fake()
    with one.stream(10_000, token_interval=0.005) as response:
        lines = response.iter_lines()
        first_word(lines)
        os.kill(one.pid, signal.SIGTERM)
        rest = [line for line in lines if line]
    assert "EngineCore encountered an issue" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert one.wait() == 0
    assert session(one.pid) == {}
    assert one.socket.exists()


def test_shutdown_timeout_lets_work_finish_and_refuses_new_connections(fake: Callable[..., Fake]) -> None:
    one = fake("--shutdown-timeout", "5")
    with one.stream(60, token_interval=0.005) as response:
        lines = response.iter_lines()
        first_word(lines)
        os.kill(one.pid, signal.SIGTERM)
        until(lambda: not one.accepts())
        rest = list(lines)
    assert len(words(rest)) == 59
    assert one.wait() == 0
    assert session(one.pid) == {}


def test_a_stopped_engine_does_not_keep_sigterm_from_working(fake: Callable[..., Fake]) -> None:
    one = fake()
    os.kill(one.state()["engine_pid"], signal.SIGSTOP)
    os.kill(one.pid, signal.SIGTERM)
    assert one.wait() == 0
    until(lambda: not session(one.pid))


# ---- planned faults


@pytest.mark.parametrize("scope", ["plan", "request"])
@pytest.mark.parametrize(("how", "code"), [("engine", 0), ("api", -9), ("exit:7", 7), ("signal:11", -11)])
def test_die_after_tokens(fake: Callable[..., Fake], how: str, code: int, scope: str) -> None:
    fault = {"die_after_tokens": 3, "how": how}
    one = fake(plan={"exit_delay_after_engine_death": 0.1, **(fault if scope == "plan" else {})})
    lines = []
    try:
        with one.stream(9, **(fault if scope == "request" else {})) as response:
            lines.extend(response.iter_lines())
        assert how == "engine"
    except httpx.RemoteProtocolError:
        with one.connect() if one.accepts() else socket.socket():
            assert how != "engine"
    assert one.wait() == code
    if how == "engine":
        assert len(words(lines)) == 3


def test_exactly_the_planned_tokens_go_out_before_a_crash(fake: Callable[..., Fake]) -> None:
    one = fake()
    raw = one.exchange(one.raw_chat("1.1", die_after_tokens=3, how="api")).decode()
    assert len(words(raw.splitlines())) == 3
    assert "[DONE]" not in raw


def test_die_after_requests_strikes_before_any_byte(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"die_after_requests": 1, "how": "api"})
    assert one.chat().status_code == 200
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        one.chat()
    assert one.wait() == -9


def test_freeze_after_tokens(shared: Fake) -> None:
    with shared.stream(5, freeze_after_tokens=2) as response:
        lines = response.iter_lines()
        first_word(lines)
        first_word(lines)
        engine = shared.state()["engine_pid"]
        until(lambda: stat_of_living(engine)[0] == "T")
        os.kill(engine, signal.SIGCONT)
        assert len(words(list(lines))) == 3


def test_each_start_has_its_plan(fake: Callable[..., Fake], tmp_path: Path) -> None:
    log = ["OSError: some/model is not a local folder", "and no model at the hub"]
    (tmp_path / "plan").write_text(json.dumps([{"die_at_start": {"log": log, "code": 3}}, {}]))
    env = {"FAKE_VLLM_COUNT": str(tmp_path / "count"), "FAKE_VLLM_PLAN": str(tmp_path / "plan")}
    first = fake(wait=False, **env)
    assert first.wait() == 3
    assert first.log.read_text().splitlines()[-2:] == log
    until(lambda: not session(first.pid))
    assert fake(**env).state()["starts"] == 2
    assert fake(**env).state()["starts"] == 3


def test_die_at_start_by_signal(fake: Callable[..., Fake]) -> None:
    assert fake(plan={"die_at_start": {"signal": 9, "after": 0.05}}, wait=False).wait() == -9


def test_ignored_sigterm_and_an_orphan(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"ignore_sigterm": True, "leave_orphan": True})
    until(lambda: "VLLM::Orphan" in session(one.pid).values())
    os.killpg(one.pid, signal.SIGTERM)
    until(lambda: "as planned" in one.log.read_text())
    assert {"VLLM::Orphan"} <= set(session(one.pid).values())


def test_shared_memory_stays_after_a_kill_and_goes_after_a_clean_stop(fake: Callable[..., Fake]) -> None:
    def segments(pid: int) -> list[Path]:
        return list(Path("/dev/shm").glob(f"psm_fake_{pid}_*"))

    one = fake(plan={"shm": 8})
    engine = one.state()["engine_pid"]
    for pid in (one.pid, engine):
        assert [segment.stat().st_size for segment in segments(pid)] == [8 << 20]
        assert str(segments(pid)[0]) in Path(f"/proc/{pid}/maps").read_text()
    os.kill(one.pid, signal.SIGTERM)
    assert one.wait() == 0
    assert segments(one.pid) + segments(engine) == []
    two = fake(plan={"shm": 8})
    os.kill(two.pid, signal.SIGKILL)
    assert len(segments(two.pid)) == 1


def test_split_characters(shared: Fake) -> None:
    with shared.connect() as client:
        client.sendall(shared.raw_chat("1.0", split_utf8=True))
        pieces = list(iter(lambda: client.recv(65536), b""))
    torn = [piece for piece in pieces if piece.decode(errors="replace").endswith("\ufffd")]
    assert len(torn) == 2
    assert len(words(b"".join(pieces).decode().splitlines())) == 4


def test_binary_stream(shared: Fake) -> None:
    assert shared.chat({"binary": True}, stream=True, max_tokens=2).content.count(b"\xff\xfe") == 2


def test_noise_in_the_log(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"log_flood": 5000, "log_binary": True})
    until(lambda: b"flood line 500\n" in one.log.read_bytes())
    data = one.log.read_bytes()
    assert b"\xff\xfe not UTF-8" in data
    assert max(map(len, data.split(b"\n"))) >= 200_000


def test_delays(fake: Callable[..., Fake]) -> None:
    one = fake(plan={"health_delay": 0.1, "prefill_seconds": 0.1, "slow_accept": 0.1})
    requests: tuple[Callable[[], httpx.Response], ...] = (
        lambda: one.http.get("/health"),
        lambda: one.chat(max_tokens=1),
    )
    for request in requests:
        started = time.monotonic()
        assert request().status_code == 200
        assert time.monotonic() - started > 0.09


def test_an_unknown_fault_in_a_request_is_said(shared: Fake) -> None:
    response = shared.chat({"load_seconds": 1})
    assert (response.status_code, "load_seconds" in response.text) == (400, True)


# ---- HTTP


def test_echo_tells_what_arrived(shared: Fake) -> None:
    request = (
        b"PATCH /fake/echo/%7Ex//y?a=1&a=%20 HTTP/1.1\r\nX-B: 2\r\nx-a:  1 \r\nX-B: \xe9\r\n"
        b"transfer-encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 5\r\n\r\n"
    )
    last = b"GET /fake/echo HTTP/1.0\r\n\r\n"
    first, second = (
        json.loads(part.split(b"\r\n\r\n")[1]) for part in shared.exchange(request + last).split(b"HTTP/1.1 200")[1:]
    )
    assert (first["method"], first["target"]) == ("PATCH", "/fake/echo/%7Ex//y?a=1&a=%20")
    assert first["headers"][:3] == [["X-B", "2"], ["x-a", "1"], ["X-B", "é"]]
    assert first["trailers"] == [["X-Sum", "5"]]
    assert (first["body_len"], first["body_sha256"]) == (5, hashlib.sha256(b"abcde").hexdigest())
    assert (first["request"], second["request"]) == (1, 2)
    assert first["connection"] == second["connection"]
    assert second["version"] == "1.0"


def test_expect_100_continue(shared: Fake) -> None:
    with shared.connect() as client:
        client.sendall(
            b"PUT /fake/echo HTTP/1.1\r\nexpect: 100-continue\r\nconnection: close\r\ncontent-length: 2\r\n\r\n"
        )
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"hi")
        assert b'"body_len":2' in b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(
    "junk",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"PUT /fake/echo HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"PUT /fake/echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0x1\r\n",
    ],
)
def test_junk_is_refused(shared: Fake, junk: bytes) -> None:
    assert shared.exchange(junk).startswith(b"HTTP/1.1 400 ")


def test_a_huge_head_is_refused(shared: Fake) -> None:
    assert shared.exchange(b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000).startswith(b"HTTP/1.1 431 ")


def raw(*parts: bytes, **more: Any) -> dict[str, Any]:
    return {"parts": [{"b64": base64.b64encode(part).decode()} for part in parts], **more}


def test_raw_writes_any_bytes_in_separate_pieces(shared: Fake) -> None:
    script = json.dumps(
        raw(b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nha", b"lf", close=True)
    ).encode()
    with shared.connect() as client:
        client.sendall(b"POST /fake/raw HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(script) + script)
        pieces = list(iter(lambda: client.recv(65536), b""))
    assert pieces == [b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nha", b"lf"]


def test_raw_before_the_body_is_read(shared: Fake) -> None:
    with shared.connect() as client:
        client.sendall(b"POST /fake/raw?no-read-body HTTP/1.1\r\ncontent-length: 3\r\n\r\n")
        assert b"early" in client.recv(1000) + client.recv(0)
        client.sendall(b"abcGET /version HTTP/1.0\r\n\r\n")
        assert b'{"version":"0.32.0"}' in b"".join(iter(lambda: client.recv(65536), b""))


def test_raw_from_the_query_tunnels(shared: Fake) -> None:
    script = base64.urlsafe_b64encode(json.dumps(raw(b"HTTP/1.1 101 Switching\r\n\r\n", echo=True)).encode()).decode()
    with shared.connect() as client:
        client.sendall(f"GET /fake/raw?raw={script} HTTP/1.1\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 101")
        client.sendall(b"\x00ping")
        assert client.recv(1000) == b"\x00ping"


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_bytes(shared: Fake, framing: str) -> None:
    http = shared.http
    response = http.get(f"/fake/bytes?n=100000&chunk=777&framing={framing}")
    assert len(response.content) == 100_000
    assert response.content == http.get("/fake/bytes?n=100000").content
    assert len(set(response.content)) == 256
    assert http.head(f"/fake/bytes?n=5&framing={framing}").content == b""


def test_sink_counts_at_its_own_pace(shared: Fake) -> None:
    http, data = shared.http, bytes(300_000)
    expected = {"body_len": len(data), "body_sha256": hashlib.sha256(data).hexdigest()}
    assert http.post("/fake/sink", content=data).json() == expected
    started = time.monotonic()
    assert http.post("/fake/sink?rate=1000000", content=data).json() == expected
    assert time.monotonic() - started > 0.25


def test_a_sink_that_never_reads_and_a_hang_notice_the_client_leaving(fake: Callable[..., Fake]) -> None:
    one = fake()
    clients = [one.connect(), one.connect()]
    clients[0].sendall(b"POST /fake/sink?rate=0 HTTP/1.1\r\ncontent-length: 99\r\n\r\n")
    clients[1].sendall(b"GET /fake/hang HTTP/1.1\r\n\r\n")
    until(lambda: one.state()["connections_open"] == 3)
    for client in clients:
        client.close()
    until(lambda: one.state()["connections_open"] == 1)


@pytest.mark.parametrize("code", [200, 204, 304, 418, 503])
def test_status(shared: Fake, code: int) -> None:
    response = shared.http.get(f"/fake/status/{code}")
    assert response.status_code == code
    assert response.content == (b"" if code in (204, 304) else b'{"status":%d}' % code)
    assert ("content-length" in response.headers) == (code not in (204, 304))


def test_an_idle_connection_is_closed(fake: Callable[..., Fake]) -> None:
    one = fake(FAKE_VLLM_KEEPALIVE="0.1")
    assert one.exchange(b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(("key", "announced"), [("close_connection_after_response", True), ("close_silently", False)])
def test_closing_after_a_response(shared: Fake, key: str, announced: bool) -> None:
    head = b'GET /version HTTP/1.1\r\nX-Fake: {"%s": true}\r\n\r\n' % key.encode()
    answer = shared.exchange(head)
    assert answer.endswith(b'{"version":"0.32.0"}')
    assert (b"connection: close" in answer) == announced


def test_state_shows_names_but_not_values(fake: Callable[..., Fake]) -> None:
    state = fake(SOME_SECRET="hush", FAKE_NOTE="seen").state()
    assert "SOME_SECRET" in state["env_names"]
    assert state["env"]["FAKE_NOTE"] == "seen"
    assert "hush" not in json.dumps(state)
