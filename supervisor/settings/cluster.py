"""Several machines that serve one model, by vLLM's own multi-node options: who is which rank, and where rank 0 is.

RunPod's Instant Clusters say it in NUM_NODES, NODE_RANK, PRIMARY_ADDR ..., torch's launchers in MASTER_ADDR and
MASTER_PORT; by hand it is NNODES, NODE_RANK, MASTER_ADDR. Rank 0 serves HTTP; the others run headless.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from supervisor.settings.platform import AUTO
from supervisor.settings.sources import Asked, Found, Report, Source, find

DATA_PARALLEL_PORT = "13345"  # of data parallel's handshake: PRIMARY_PORT is for torch
VLLMS_PORT, VLLMS_DATA_PARALLEL_PORT = 29501, 29550  # where none is set
RAY = "ray"
# Options of several machines that mean nothing on one: torch's launchers set these names for their own ends.
OF_SEVERAL = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# Settings of the user's own by which the model is spread: where there is one, nothing is chosen for him.
SPREAD = ("TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE", "DATA_PARALLEL_SIZE")


class Cluster(NamedTuple):
    """`replicas`: each machine has whole models (data parallelism), else a part of one. `port`: rank 0's, where the
    parts keep together, or where replicas shake hands. `environ`: below what the user set."""

    nodes: int
    rank: int
    leader: str
    port: int
    replicas: bool
    environ: Mapping[str, str]

    @property
    def headless(self) -> bool:
        return self.rank > 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.nodes}"


def nodes(environ: Mapping[str, str]) -> int:
    text = environ.get("NUM_NODES", "").strip()
    return max(1, int(text)) if text.isdecimal() else 1


def derived(environ: Mapping[str, str], users: Sequence[Source]) -> Source:
    """What a cluster's variables say, beneath what the user says himself."""
    count = nodes(environ)
    if count < 2 or RAY in (environ.get("DISTRIBUTED_EXECUTOR_BACKEND"), environ.get("DATA_PARALLEL_BACKEND")):
        return {}
    asked = {name: str(found[0].given).strip() for name in SPREAD if (found := find(users, name))}
    replicas = asked.get("DATA_PARALLEL_SIZE", "1")
    # Option -> the variable that says it, and the value, where it is not that one's as it stands.
    if replicas.isdecimal() and int(replicas) > 1:  # whole models on each machine, behind rank 0
        local, rank = max(1, int(replicas) // count), environ.get("NODE_RANK", "")
        rows = {
            "DATA_PARALLEL_SIZE_LOCAL": ("NUM_NODES", str(local)),
            "DATA_PARALLEL_ADDRESS": ("PRIMARY_ADDR" if environ.get("PRIMARY_ADDR") else "MASTER_ADDR", ""),
            "DATA_PARALLEL_RPC_PORT": ("NUM_NODES", DATA_PARALLEL_PORT),
        }
        if rank.isdecimal() and int(rank):
            rows["DATA_PARALLEL_START_RANK"] = ("NODE_RANK", str(int(rank) * local))
    else:  # MASTER_ADDR, MASTER_PORT and NODE_RANK are vLLM's own names
        rows = {"NNODES": ("NUM_NODES", ""), "MASTER_ADDR": ("PRIMARY_ADDR", ""), "MASTER_PORT": ("PRIMARY_PORT", "")}
        # Within a machine the GPUs are near each other; between machines one hop is few. `auto`: all of a machine's.
        if asked.keys() <= {"TENSOR_PARALLEL_SIZE"} and asked.get("TENSOR_PARALLEL_SIZE", "auto").lower() in AUTO:
            rows |= {"PIPELINE_PARALLEL_SIZE": ("NUM_NODES", ""), "TENSOR_PARALLEL_SIZE": ("NUM_TRAINERS", "")}
    return {
        option: Found(f"environment {name}={environ[name]}", value or environ[name])
        for option, (name, value) in rows.items()
        if environ.get(name)
    }


def cluster(asked: Asked, report: Report) -> Cluster | None:
    """By the effective options. What can't be is a problem."""
    count, replicas = asked.count("NNODES", 1), asked.count("DATA_PARALLEL_SIZE", 1)
    local = max(1, asked.count("DATA_PARALLEL_SIZE_LOCAL", replicas))
    if RAY in (asked["DISTRIBUTED_EXECUTOR_BACKEND"].value, asked["DATA_PARALLEL_BACKEND"].value):
        return None  # one vLLM, whose workers Ray starts wherever it runs
    if count > 1:  # parts of one model
        rank, port, address = asked.count("NODE_RANK", 0), asked.count("MASTER_PORT", VLLMS_PORT), "MASTER_ADDR"
        size = asked.count("TENSOR_PARALLEL_SIZE", 1) * asked.count("PIPELINE_PARALLEL_SIZE", 1) * replicas
        if size % count:
            report.problems.append(
                f"NNODES={count}: a model spread over {size} GPUs (TENSOR_PARALLEL_SIZE x PIPELINE_PARALLEL_SIZE) "
                f"can't be shared out among {count} machines: set them so that {count} divides their product"
            )
    elif replicas > local and not any(asked[f"DATA_PARALLEL_{whose}_LB"].value for whose in ("HYBRID", "EXTERNAL")):
        count, rank = -(-replicas // local), asked.count("DATA_PARALLEL_START_RANK", 0) // local
        port, address = asked.count("DATA_PARALLEL_RPC_PORT", VLLMS_DATA_PARALLEL_PORT), "DATA_PARALLEL_ADDRESS"
        if replicas % nodes(asked.environ):
            report.problems.append(
                f"DATA_PARALLEL_SIZE={replicas}: so many whole models can't be shared out among {nodes(asked.environ)} "
                "machines: set a multiple of their number"
            )
    else:
        return None
    if rank >= count:
        report.problems.append(f"NODE_RANK={rank}: of {count} machines the last one has rank {count - 1}")
    leader = asked[address].value
    if not leader:
        report.problems.append(f"{address} is not set: on each machine, set it to the address of the one with rank 0")
        return None
    return Cluster(count, rank, str(leader), port, address != "MASTER_ADDR", _own(str(leader), asked.environ))


def _own(leader: str, environ: Mapping[str, str]) -> dict[str, str]:
    """This machine's address among the others, and the network that has it: gloo and NCCL guess, and guess loopback."""
    own = environ.get("NODE_ADDR", "").partition("/")[0].strip() or _towards(leader)
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
    except (OSError, UnicodeError):  # no name of a host: "./x"
        return ""
