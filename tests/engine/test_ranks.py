"""Two supervisors that serve one model together, on the fake: they come, go and start again as one."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import pytest

from tests.harness import Supervisor, events, session_pids, wait_until

pytestmark = pytest.mark.slow  # each test starts two supervisors

CHAT = "/v1/chat/completions"
# Not 127.0.0.1, where the workers of one machine meet. Nor can a rank that looks for the other reach itself by chance.
LEADER = "127.0.0.2"


def chat(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LEADER, 0))
        return int(probe.getsockname()[1])


class Whole:
    """Starts supervisors as ranks of one model; each as often as it is asked to."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.port = stack, free_port()

    def rank(self, rank: int, plan: object = None, **environ: str) -> Supervisor:
        place = {"NUM_NODES": "2", "NODE_RANK": str(rank), "PRIMARY_ADDR": LEADER, "PRIMARY_PORT": str(self.port)}
        # Every failure counts as the first: nobody waits longer and longer.
        often = {"SUPERVISOR_RESTART_WINDOW": "0.05", "TENSOR_PARALLEL_SIZE": "2"}
        supervisor = Supervisor("m", plan=plan, environ={**place, **often, **environ})
        return self.stack.enter_context(supervisor)

    def both(self, plan: object = None) -> tuple[Supervisor, Supervisor]:
        first, other = self.rank(0, plan), self.rank(1)
        ready(first)
        ready(other)
        return first, other


@contextmanager
def whole() -> Iterator[Whole]:
    with ExitStack() as stack:
        yield Whole(stack)


def ready(supervisor: Supervisor, starts: int = 1) -> None:
    wait_until(lambda: supervisor.output.count("-> ready: ") >= starts, f"start {starts}", 20)
    supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]  # not always that of the first start


def part(supervisor: Supervisor, name: str) -> int:
    """The pid of a process of the engine; "" is the one that was started."""
    session = int(supervisor.client.get("/status").json()["pid"])
    if not name:
        return session

    def named() -> int | None:  # it takes its name when its program has begun: vLLM may be ready before
        return next((pid for pid in session_pids(session) if psutil.Process(pid).name().startswith(name)), None)

    return wait_until(named, name)


def state(supervisor: Supervisor) -> str:
    return str(supervisor.client.get("/status").json()["state"])


def waits(supervisor: Supervisor, during: str) -> None:
    def waiting() -> bool:
        status = supervisor.client.get("/status").json()
        return (status["state"], status["phases"][-1]["name"]) == (during, "waiting for the other ranks")

    wait_until(waiting, f"waiting for the other ranks, {during}", 20)


# Coming


def test_two_make_one_whole() -> None:
    with whole() as ranks:
        other = ranks.rank(1)
        waits(other, "starting")
        assert other.client.get("/ping").status_code == 204
        assert "waiting for the other ranks" in other.client.get("/health").json()["status"]
        first = ranks.rank(0)
        ready(first)
        ready(other)
        other.says(rf"ready: rank 1 of 2; rank 0, at {LEADER}, serves")
        for supervisor, name in ((first, "rank 0 of 2"), (other, "rank 1 of 2")):
            assert supervisor.client.get("/ping").status_code == 200
            assert supervisor.client.get("/health").status_code == 200
            assert supervisor.client.get("/metrics").status_code == 200
            assert supervisor.client.get("/status").json()["cluster"] == name
        assert first.client.post(CHAT, json=chat()).status_code == 200


def test_a_request_to_another_rank_is_told_where_to_go() -> None:
    """At once, also while it loads: it would never be answered there."""
    with whole() as ranks:
        other = ranks.rank(1)
        for method, path in (("POST", CHAT), ("GET", "/v1/models")):
            answer = other.client.request(method, path, json=chat())
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "not_rank_0"
            assert f"rank 0, at {LEADER}, serves" in answer.json()["error"]["message"]


def test_requests_are_held_until_a_late_rank_has_joined() -> None:
    with whole() as ranks, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = ranks.rank(0)
        waits(first, "starting")
        held = pool.submit(first.client.post, CHAT, json=chat())
        wait_until(lambda: first.client.get("/status").json()["waiting"] == 1, "the held request")
        other = ranks.rank(1)
        assert held.result().status_code == 200
        ready(other)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_waited_for_again_and_then_given_up(rank: int) -> None:
    with whole() as ranks:
        limits = {"SUPERVISOR_STARTUP_TIMEOUT": "4", "SUPERVISOR_MAX_RESTARTS": "1", "SUPERVISOR_RESTART_WINDOW": "60"}
        alone = ranks.rank(rank, **limits)
        alone.says("restart 1 of 1")
        waits(alone, "starting")
        failure = alone.client.get("/status").json()["last_failure"]
        assert (
            "not ready after 4 s (SUPERVISOR_STARTUP_TIMEOUT), it was at: waiting for the other ranks"
            in failure["cause"]
        )
        assert "Start the other machines with the same MASTER_ADDR and MASTER_PORT" in failure["remedy"]
        assert "open all ports" in failure["remedy"]
        session = part(alone, "")
        assert alone.exit_code() == 3
        assert "1 restarts in 60 s is the limit" in alone.output
        assert session_pids(session) == []


# Failing


@pytest.mark.parametrize(
    ("rank", "victim"),
    [(0, "VLLM::Worker"), (0, "VLLM::EngineCore"), (0, ""), (1, "VLLM::Worker"), (1, "")],
    ids=["worker of rank 0", "engine of rank 0", "API server of rank 0", "worker of rank 1", "rank 1's vLLM"],
)  # fmt: skip
def test_whatever_dies_the_whole_starts_again(rank: int, victim: str) -> None:
    with whole() as ranks:
        both = ranks.both()
        os.kill(part(both[rank], victim), signal.SIGKILL)
        for supervisor in both:
            ready(supervisor, 2)
        assert both[0].client.post(CHAT, json=chat()).status_code == 200
        neighbour = both[1 - rank]
        assert "the rank at 127.0.0." in neighbour.output
        assert (
            "gone: all of them have to start again" in neighbour.client.get("/status").json()["last_failure"]["cause"]
        )
        assert "is gone" not in both[rank].output  # there it is said what died
        assert [supervisor.client.get("/status").json()["restarts"] for supervisor in both] == [1, 1]


def test_a_stream_ends_and_a_request_is_answered_when_another_rank_dies() -> None:
    with whole() as ranks, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first, other = ranks.both()
        slow = {"X-Fake": json.dumps({"token_interval": 0.05})}
        received = b""
        with first.client.stream("POST", CHAT, json=chat(stream=True, max_tokens=1000), headers=slow) as answer:
            for data in answer.iter_raw():
                if not received:
                    os.kill(part(other, "VLLM::Worker"), signal.SIGKILL)
                    waiting = pool.submit(first.client.post, CHAT, json=chat(max_tokens=40), headers=slow)
                received += data
        assert list(events(received))[-1]["error"]["code"] == "engine_stopped"  # type: ignore[index]
        assert received.endswith(b"data: [DONE]\n\n")
        assert waiting.result().status_code == 200  # by the next engine
        assert first.client.get("/status").json()["restarts"] == 1


def test_a_machine_that_is_gone_is_waited_for() -> None:
    with whole() as ranks:
        first, other = ranks.both()
        other.signal(signal.SIGKILL)
        waits(first, "starting")
        assert first.client.get("/ping").status_code == 204
        again = ranks.rank(1)
        ready(again)
        ready(first, 2)
        assert first.client.post(CHAT, json=chat()).status_code == 200


# Leaving


def test_sigterm_on_another_rank_alone_ends_it_and_rank_0_waits() -> None:
    with whole() as ranks:
        first, other = ranks.rank(0), ranks.rank(1, SUPERVISOR_DRAIN_TIMEOUT="0.5")
        ready(first)
        ready(other)
        session = part(other, "")
        other.signal(signal.SIGTERM)
        assert other.exit_code() == 0
        assert "ignored SIGTERM" not in other.output
        assert session_pids(session) == []
        waits(first, "starting")


def streamed(first: Supervisor, interval: float, tokens: int, meanwhile: Callable[[], object]) -> dict[str, Any]:
    """The last event of a stream of rank 0's, with `meanwhile` after its first bytes."""
    slow = {"X-Fake": json.dumps({"token_interval": interval})}
    received = b""
    with first.client.stream("POST", CHAT, json=chat(stream=True, max_tokens=tokens), headers=slow) as answer:
        for data in answer.iter_raw():
            if not received:
                meanwhile()
            received += data
    return dict(list(events(received))[-1])


def test_sigterm_on_all_at_once_lets_rank_0_finish() -> None:
    """As every orchestrator sends it: rank 0's last answers need the others."""
    with whole() as ranks:
        first, other = ranks.both()

        def stop() -> None:
            other.signal(signal.SIGTERM)
            first.signal(signal.SIGTERM)
            first.says("ready -> draining")
            other.says("ready -> draining")

        assert streamed(first, 0.02, 100, stop)["choices"][0]["finish_reason"] == "length"
        assert (first.exit_code(), other.exit_code()) == (0, 0)


def test_sigterm_on_rank_0_drains_and_the_others_wait() -> None:
    with whole() as ranks:
        first, other = ranks.both()

        def stop() -> None:
            first.signal(signal.SIGTERM)
            first.says("ready -> draining")
            assert state(other) == "ready"

        assert streamed(first, 0.02, 100, stop)["choices"][0]["finish_reason"] == "length"
        assert first.exit_code() == 0
        assert session_pids(first.engine_pid or 0) == []
        other.says(rf"ready -> restarting: the rank at {LEADER} is gone")
        waits(other, "starting")


def test_a_rank_that_is_gone_while_rank_0_drains_ends_it() -> None:
    """What it still worked on can't be finished any more."""
    with whole() as ranks:
        first, other = ranks.both()

        def stop() -> None:
            first.signal(signal.SIGTERM)
            first.says("ready -> draining")
            other.signal(signal.SIGKILL)

        assert "error" in streamed(first, 0.05, 1000, stop)
        assert first.exit_code() == 128 + signal.SIGTERM


# What only looks like a death


def test_the_end_of_a_workers_helper_is_nobodys_death() -> None:
    """A worker that starts a compiler is there twice for a moment, under one name."""
    with Supervisor("m", plan=[{"worker_helper": True, "load_seconds": 2}, {}]) as supervisor:

        def helpers() -> list[psutil.Process]:
            workers = [psutil.Process(pid) for pid in session_pids(supervisor.engine())]
            workers = [process for process in workers if process.name() == "VLLM::Worker"]
            return [process for process in workers if process.parent() in workers]

        (helper,) = wait_until(helpers, "a worker with a helper")
        worker = helper.ppid()
        assert "-> ready" not in supervisor.output
        supervisor.ready()  # by now every part has been seen
        helper.kill()
        wait_until(lambda: not helper.is_running(), "the helper's end")
        assert supervisor.client.post(CHAT, json=chat()).status_code == 200
        os.kill(worker, signal.SIGKILL)
        supervisor.says(r"ready -> restarting: VLLM::\w+ \(pid \d+\) died")  # its engine may have been quicker to leave
        assert f"pid {helper.pid}" not in supervisor.output
        supervisor.says(r"(?s)restarting -> starting.*starting -> ready")
        supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]
