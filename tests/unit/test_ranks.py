"""Which lines make a headless rank ready, and which connections tell that another rank is gone."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.around.multinode import Ranks
from supervisor.engine.session import Session
from supervisor.settings.cluster import Cluster
from tests.harness import wait_until

# vLLM 0.32's own lines on two machines (CPU build), cut to what matters.
HEADLESS = """\
(MainProcess pid=2) INFO 11-26 00:10:23 [serve.py:224] Launching vLLM (v0.32.0) headless multiproc executor, with head node address 10.77.0.1:29501 for torch.distributed process group.
(Worker pid=3) INFO 11-26 00:10:45 [parallel_state.py:1906] world_size=2 rank=1 local_rank=0 distributed_init_method=tcp://10.77.0.1:29501 backend=gloo
(Worker pid=3) INFO 11-26 00:11:02 [parallel_state.py:2350] rank 1 in world size 2 is assigned as DP rank 0, PP rank 0, PCP rank 0, TP rank 1, ETP rank 1, EP rank N/A, EPLB rank N/A
(Worker_TP1 pid=3) INFO 11-26 00:11:02 [cpu_model_runner.py:68] Starting to load model /demo/model...
(Worker_TP1 pid=3) INFO 11-26 00:11:03 [default_loader.py:501] Loading weights took 0.02 seconds
(Worker_TP1 pid=3) INFO 11-26 00:11:07 [cpu_worker.py:260] Explicitly set (1.0/23.54) GiB for KV cache on node 0.
"""  # noqa: E501
REPLICA = """\
(MainProcess pid=2) INFO 11-26 00:06:50 [serve.py:239] Launching 1 data parallel engine(s) in headless mode, with head node address tcp://10.77.0.1:13345.
(EngineCore_DP1 pid=3) INFO 11-26 00:07:10 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='/demo/model'
(Worker pid=4) INFO 11-26 00:07:27 [parallel_state.py:1906] world_size=1 rank=0 local_rank=0 distributed_init_method=file:///tmp/vllm_dist_d1 backend=gloo
(Worker pid=4) INFO 11-26 00:07:28 [parallel_state.py:2350] rank 0 in world size 1 is assigned as DP rank 0, PP rank 0, PCP rank 0, TP rank 0, ETP rank 0, EP rank N/A, EPLB rank N/A
(Worker pid=4) INFO 11-26 00:07:30 [cpu_worker.py:260] Explicitly set (1.0/23.54) GiB for KV cache on node 0.
(EngineCore_DP1 pid=3) INFO 11-26 00:07:30 [kv_cache_utils.py:2327] CPU KV cache size: 1,048,576 tokens
(EngineCore_DP1 pid=3) INFO 11-26 00:07:31 [core.py:402] init engine (profile, create kv cache, warmup model) took 1.08 s
"""  # noqa: E501
# One machine, one and two workers: all that these have in common with the others.
ONE_MACHINE = """\
(Worker pid=3) INFO 11-26 00:00:07 [parallel_state.py:1906] world_size=2 rank=1 local_rank=1 distributed_init_method=file:///tmp/vllm_dist_83 backend=gloo
(Worker pid=2) INFO 11-26 00:00:07 [parallel_state.py:2350] rank 0 in world size 2 is assigned as DP rank 0, PP rank 0, PCP rank 0, TP rank 0, ETP rank 0, EP rank N/A, EPLB rank N/A
(Worker_TP0 pid=2) INFO 11-26 00:00:10 [cpu_worker.py:260] Explicitly set (1.0/23.54) GiB for KV cache on node 0.
(EngineCore pid=1) INFO 11-26 00:00:12 [core.py:402] init engine (profile, create kv cache, warmup model) took 1.54 s
"""  # noqa: E501
# What a GPU's worker says instead of "Explicitly set": vllm/v1/worker/gpu_worker.py.
PROFILED = "(Worker_TP1 pid=3) INFO 11-26 00:11:07 [gpu_worker.py:760] Available KV cache memory: 62.31 GiB"
GIVEN = (
    "(Worker_TP1 pid=3) INFO 11-26 00:11:07 [gpu_worker.py:660] Initial free memory 78.1 GiB, reserved 4.0 GiB memory "
    "for KV Cache as specified by kv_cache_memory_bytes config and skipped memory profiling."
)


def cluster(rank: int = 1, *, port: int = 29501, replicas: bool = False, leader: str = "127.0.0.1") -> Cluster:
    return Cluster(2, rank, leader, port, replicas, {})


@pytest.mark.parametrize(
    "log", [HEADLESS, REPLICA, *(HEADLESS.replace(HEADLESS.splitlines()[-1], line) for line in (PROFILED, GIVEN))]
)
def test_a_headless_rank_is_ready_with_the_last_line_of_its_start(log: str) -> None:
    ranks = Ranks(cluster())
    for line in log.splitlines():
        assert not ranks.is_loaded
        ranks.hear(line)
    assert ranks.is_loaded


def test_of_several_replicas_on_one_machine_all_are_awaited() -> None:
    ranks = Ranks(cluster(replicas=True))
    first, *others = REPLICA.replace("Launching 1 data", "Launching 2 data").splitlines()
    for line in (first, first, *others):  # lines that came before anybody listened may come twice
        ranks.hear(line)
    assert not ranks.is_loaded
    ranks.hear(others[-1])
    assert ranks.is_loaded


def test_one_machines_lines_do_not_count() -> None:
    ranks = Ranks(cluster())
    for line in ONE_MACHINE.splitlines() * 2:
        ranks.hear(line)
    assert not ranks.is_loaded


# Connections: this process is one rank, a child in a session of its own the engine of the other.

CHILD = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
if sys.argv[1] == "listen":
    listener = socket.create_server((sys.argv[2], 0), family=family, dualstack_ipv6=sys.argv[2] == "::")
    print(listener.getsockname()[1], flush=True)
    met = listener.accept()[0]
else:
    met = socket.create_connection((sys.argv[2], int(sys.argv[3])))
# One more to itself, as rank 0's worker has to its own store, and one that has nothing to do with ranks.
own = socket.create_server((sys.argv[2], 0), family=family)
mine = socket.create_connection(own.getsockname()[:2])
other = own.accept()[0]
print("met", flush=True)
for line in sys.stdin:
    {"met": met, "own": mine}[line.strip()].close()
    print("closed", flush=True)
"""


class Child:
    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", CHILD, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
        )  # fmt: skip

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self, which: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{which}\n")
        assert self.says() == "closed"


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[Child]:
    started = Child(*arguments)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def has_ipv6() -> bool:
    return Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text()


ADDRESSES = [
    ("127.0.0.1", "127.0.0.1"),
    pytest.param("::1", "::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    # A listener for both IPs, as torch's store: the kernel writes its clients as ::ffff:127.0.0.1.
    pytest.param("::", "127.0.0.1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
]


@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.parametrize(("listened", "address"), ADDRESSES)
def test_rank_0_notes_who_has_come_and_tells_who_is_gone(listened: str, address: str, replicas: bool) -> None:
    with child("listen", listened) as engine:
        port = int(engine.says())
        # Replicas come to a port that nobody knows beforehand.
        ranks = Ranks(cluster(0, port=1 if replicas else port, replicas=replicas))
        assert ranks.note_connections(Session.from_leader(engine.process.pid)) == 0
        with socket.create_connection((address, port)):
            assert engine.says() == "met"
            assert ranks.note_connections(Session.from_leader(engine.process.pid)) == 1
            engine.close("own")
            assert ranks.find_lost_rank() is None
        assert wait_until(ranks.find_lost_rank, "the end of it") == address


@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.parametrize(("listened", "address"), ADDRESSES)
def test_a_headless_rank_notes_rank_0(listened: str, address: str, replicas: bool) -> None:
    family = socket.AF_INET6 if ":" in listened else socket.AF_INET
    with socket.create_server((listened, 0), family=family, dualstack_ipv6=listened == "::") as listener:
        port = listener.getsockname()[1]
        ranks = Ranks(cluster(1, port=1 if replicas else port, replicas=replicas, leader=address))
        with child("connect", address, str(port)) as engine, listener.accept()[0]:
            assert engine.says() == "met"
            assert ranks.note_connections(Session.from_leader(engine.process.pid)) == 1
            assert ranks.find_lost_rank() is None
            engine.close("met")
            assert wait_until(ranks.find_lost_rank, "the end of it") == address


def test_the_handshake_of_replicas_holds_nothing_together() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ranks = Ranks(cluster(1, port=port, replicas=True))
        with child("connect", "127.0.0.1", str(port)) as engine, listener.accept()[0]:
            assert engine.says() == "met"
            assert ranks.note_connections(Session.from_leader(engine.process.pid)) == 0


@pytest.mark.parametrize("leader", ["10.255.255.1", "no-such-host.invalid"])
def test_a_replicas_other_connections_are_not_rank_0(leader: str) -> None:
    """To a hub, say, or a database of metrics."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ranks = Ranks(cluster(1, port=1, replicas=True, leader=leader))
        with child("connect", "127.0.0.1", str(listener.getsockname()[1])) as engine, listener.accept()[0]:
            assert engine.says() == "met"
            assert ranks.note_connections(Session.from_leader(engine.process.pid)) == 0


def test_connections_of_others_are_not_the_engines() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with child("connect", "127.0.0.1", str(port)) as stranger, listener.accept()[0]:
            assert stranger.says() == "met"
            ranks = Ranks(cluster(1, port=port))
            assert ranks.note_connections(Session(1 << 22)) == 0
            assert ranks.find_lost_rank() is None


def test_the_lines_are_those_that_the_fake_logs() -> None:
    """Or the tests on the fake would prove nothing about vLLM."""
    text = (Path(__file__).parents[2] / "scripts" / "fake_vllm").read_text()
    text += (Path(__file__).parents[2] / "scripts" / "fake_vllm_api.py").read_text()
    for wording in (
        "headless multiproc executor, with head node address",
        "is assigned as",
        "GiB for KV cache on node",
    ):
        assert wording in text
        assert re.search(re.escape(wording), HEADLESS)
