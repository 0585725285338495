"""/metrics: what happens to requests and to the engine is found there, by Prometheus' own parser."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import Supervisor, wait_until

CHAT = "/v1/chat/completions"


def chat(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}


class Scrape:
    """One reading: `scrape("name", label="value")` is the sum of the samples that have these labels; with `since`, what
    has come to it since that reading."""

    def __init__(self, supervisor: Supervisor, since: Scrape | None = None) -> None:
        self.text = supervisor.client.get("/metrics").text
        self.samples = [sample for family in text_string_to_metric_families(self.text) for sample in family.samples]
        self.since = since

    def __call__(self, name: str, **labels: str) -> float:
        return sum(
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ) - (self.since(name, **labels) if self.since is not None else 0)


@pytest.fixture(scope="module")
def counted() -> Iterator[Supervisor]:
    with Supervisor("m") as supervisor:
        yield supervisor.ready()


def test_answers_are_counted_by_route_and_status(counted: Supervisor) -> None:
    before = Scrape(counted)
    body = json.dumps(chat(max_tokens=1)).encode()
    for _ in range(3):
        counted.client.post(CHAT, content=body)
    one_by_one = {"X-Fake": json.dumps({"token_interval": 0.01})}
    streamed = counted.client.post(CHAT, json=chat(max_tokens=5, stream=True), headers=one_by_one)
    counted.client.get("/v1/nowhere")
    counted.client.get("/nobody/knows")
    scrape = Scrape(counted, before)
    good = {"route": CHAT, "status": "200"}
    for name in ("requests_total", "first_byte_seconds_count", "request_seconds_count"):
        assert scrape(f"supervisor_{name}", **good) == 4
        assert scrape(f"supervisor_{name}", route="/v1/nowhere", status="404") == 1
        assert scrape(f"supervisor_{name}", route="other", status="404") == 1
    assert scrape("supervisor_event_gap_seconds_count") >= 1
    assert scrape("supervisor_sent_bytes_total") >= len(streamed.content)
    assert scrape("supervisor_received_bytes_total") >= 3 * len(body)
    assert scrape.text.count("# TYPE supervisor_requests_total counter") == 1
    assert before("supervisor_engine_state", state="ready") == before("supervisor_engine_state") == 1
    assert before("supervisor_start_phase_seconds", phase="loading weights") >= 0
    assert "vllm:num_requests_running" in scrape.text
    head = counted.client.get("/metrics").headers["content-type"]
    assert head.startswith("text/plain; version=0.0.4")


def test_the_whole_of_an_answer_takes_longer_than_its_first_byte(counted: Supervisor) -> None:
    before = Scrape(counted)
    slowly = {"X-Fake": json.dumps({"token_interval": 0.03})}
    counted.client.post(CHAT, json=chat(max_tokens=10, stream=True), headers=slowly)
    scrape = Scrape(counted, before)
    assert scrape("supervisor_request_seconds_sum") > scrape("supervisor_first_byte_seconds_sum") + 0.2
    assert scrape("supervisor_event_gap_seconds_sum") > 0.2


def test_a_streams_first_byte_is_its_first_event(counted: Supervisor) -> None:
    """vLLM sends the head of a stream at once; nobody waits for that."""
    before = Scrape(counted)
    late = {"X-Fake": json.dumps({"prefill_seconds": 0.3})}
    counted.client.post(CHAT, json=chat(max_tokens=3, stream=True), headers=late)
    scrape = Scrape(counted, before)
    assert scrape("supervisor_first_byte_seconds_count", route=CHAT) == 1
    assert scrape("supervisor_first_byte_seconds_sum", route=CHAT) > 0.25
    assert scrape("supervisor_event_gap_seconds_sum") < 0.25


def test_clients_that_go_are_told_apart(counted: Supervisor) -> None:
    """Before a byte of their answer: status 499; in its midst: aborted."""
    before = Scrape(counted)
    slow = {"X-Fake": json.dumps({"token_interval": 0.05})}
    with counted.client.stream("POST", CHAT, json=chat(max_tokens=100, stream=True), headers=slow) as answer:
        next(answer.iter_raw())
    wait_until(lambda: Scrape(counted, before)("supervisor_requests_aborted_total") == 1, "the aborted one")
    with contextlib.suppress(httpx.TimeoutException):
        counted.client.post(CHAT, json=chat(max_tokens=100), headers=slow, timeout=0.3)
    gone = {"route": CHAT, "status": "499"}
    wait_until(lambda: Scrape(counted, before)("supervisor_requests_total", **gone) == 1, "the one nobody waited for")


def test_an_answer_that_we_cut_is_no_clients_doing() -> None:
    with Supervisor("m", environ={"SUPERVISOR_REQUEST_TIMEOUT": "0.5"}) as supervisor:
        supervisor.ready()
        with pytest.raises(httpx.TransportError):
            supervisor.client.get("/fake/bytes?n=100000&chunk=100&framing=chunked&interval=0.05")
        scrape = Scrape(supervisor)
        assert scrape("supervisor_requests_total", route="/fake", status="200") == 1
        assert scrape("supervisor_requests_aborted_total") == 0


def test_without_an_engine_they_are_ours_alone(starting: Supervisor) -> None:
    scrape = Scrape(starting)
    assert scrape("supervisor_engine_state", state="starting") == 1
    assert "vllm:" not in scrape.text
