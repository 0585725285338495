"""Several machines that serve one model, by vLLM's own multi-node options: who is which rank, and where rank 0 is.

RunPod's Instant Clusters say it in NUM_NODES, NODE_RANK, PRIMARY_ADDR ..., torch's launchers in MASTER_ADDR and
MASTER_PORT; by hand it is NNODES, NODE_RANK, MASTER_ADDR. Rank 0 serves HTTP; the others run headless.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

DATA_PARALLEL_PORT = "13345"  # of data parallel's handshake; torch's port is another
# Options of several machines that mean nothing on one: torch's launchers set these names for their own ends.
OF_SEVERAL = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# Settings of the user's own by which the model is spread: where there is one, nothing is chosen for him.
SPREAD = ("TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE", "DATA_PARALLEL_SIZE")


@dataclass(frozen=True, slots=True)
class Cluster:
    """`ports`: those of rank 0 by which the ranks keep together. `environ`: below what the user set."""

    nodes: int
    rank: int
    leader: str
    ports: frozenset[int]
    environ: Mapping[str, str]

    @property
    def headless(self) -> bool:
        return self.rank > 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.nodes}"


def nodes(environ: Mapping[str, str]) -> int:
    text = environ.get("NUM_NODES", "").strip()
    return int(text) if text.isdigit() else 1


def derived(environ: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Variable -> (source, value), for what a cluster's variables say. `asked`: what the user set of SPREAD."""
    count = nodes(environ)
    if count < 2:
        return {}
    leader = environ.get("PRIMARY_ADDR") or environ.get("MASTER_ADDR") or ""
    port = environ.get("PRIMARY_PORT") or environ.get("MASTER_PORT") or ""
    found: dict[str, tuple[str, str]] = {}

    def add(variable: str, source: str, value: str) -> None:
        if value:
            found[variable] = (f"environment {source}={value}" if source != "" else "cluster", value)

    replicas = asked.get("DATA_PARALLEL_SIZE", "1")
    if replicas.isdigit() and int(replicas) > 1:  # whole models on each machine, behind rank 0
        local = max(1, int(replicas) // count)
        add("DATA_PARALLEL_SIZE_LOCAL", "", str(local))
        add("DATA_PARALLEL_ADDRESS", "PRIMARY_ADDR", leader)
        add("DATA_PARALLEL_RPC_PORT", "", DATA_PARALLEL_PORT)
        rank = environ.get("NODE_RANK", "0")
        if rank.isdigit() and int(rank):
            add("DATA_PARALLEL_START_RANK", "NODE_RANK", str(int(rank) * local))
        return found
    add("NNODES", "NUM_NODES", str(count))
    add("NODE_RANK", "NODE_RANK", environ.get("NODE_RANK", ""))
    add("MASTER_ADDR", "PRIMARY_ADDR", leader)
    add("MASTER_PORT", "PRIMARY_PORT", port)
    if not asked:  # within a machine the GPUs are near each other, between machines one hop for each layer's end is few
        add("PIPELINE_PARALLEL_SIZE", "NUM_NODES", str(count))
        add("TENSOR_PARALLEL_SIZE", "NUM_TRAINERS", environ.get("NUM_TRAINERS", ""))
    return found


def cluster(value: Mapping[str, object], environ: Mapping[str, str], problems: list[str]) -> Cluster | None:
    """`value`: the effective options, by variable. What can't be is added to `problems`."""

    def number(variable: str, default: int) -> int:
        given = value.get(variable)
        return int(str(given)) if str(given or "").isdigit() else default

    count, replicas = number("NNODES", 1), number("DATA_PARALLEL_SIZE", 1)
    local = number("DATA_PARALLEL_SIZE_LOCAL", replicas)
    own_front = value.get("DATA_PARALLEL_HYBRID_LB") or value.get("DATA_PARALLEL_EXTERNAL_LB")
    if count > 1:
        rank, leader, port = number("NODE_RANK", 0), value.get("MASTER_ADDR"), number("MASTER_PORT", 29501)
        size = number("TENSOR_PARALLEL_SIZE", 1) * number("PIPELINE_PARALLEL_SIZE", 1) * replicas
        if size % count:
            problems.append(
                f"NNODES={count}: a model spread over {size} GPUs (TENSOR_PARALLEL_SIZE x PIPELINE_PARALLEL_SIZE) "
                f"can't be shared out among {count} machines: set them so that {count} divides their product"
            )
    elif replicas > max(1, local) and not own_front:
        count, leader, port = -(-replicas // max(1, local)), value.get("DATA_PARALLEL_ADDRESS"), 0
        port = number("DATA_PARALLEL_RPC_PORT", 0)
        rank = number("DATA_PARALLEL_START_RANK", 0) // max(1, local)
    else:
        return None
    if rank >= count:
        problems.append(f"NODE_RANK={rank}: of {count} machines the last one has rank {count - 1}")
    if not leader:
        problems.append("MASTER_ADDR is not set: on each machine, set it to the address of the one with rank 0")
        return None
    return Cluster(count, rank, str(leader), frozenset({port} - {0}), _own(str(leader), environ))


def _own(leader: str, environ: Mapping[str, str]) -> dict[str, str]:
    """This machine's address among the others, and the network that has it: gloo and NCCL guess, and guess loopback."""
    own = environ.get("NODE_ADDR") or _towards(leader)
    if not own:
        return {}
    import psutil  # noqa: PLC0415  # 20 ms, for clusters only

    found = {"VLLM_HOST_IP": own}
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            found |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return found


def _towards(leader: str) -> str:
    """The address that this machine has towards another. Nothing is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(leader, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""
