"""Several machines may serve one model by vLLM's own multi-node options: this finds their ranks, and where rank 0 is.

RunPod's Instant Clusters say it in NUM_NODES, NODE_RANK, PRIMARY_ADDR ..., torch's launchers in MASTER_ADDR and
MASTER_PORT; a person sets NNODES, NODE_RANK and MASTER_ADDR. Rank 0 serves HTTP; the others run headless.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from supervisor.settings.platform import AUTO_WORDS
from supervisor.settings.sources import Entry, Facts, Report, Source, find_all

CLUSTER_HANDSHAKE_PORT = "13345"  # for data parallel's handshake, since PRIMARY_PORT is for torch
MASTER_PORT, HANDSHAKE_PORT = 29501, 29550  # vLLM uses these where none is set
RAY, BACKENDS = "ray", ("DISTRIBUTED_EXECUTOR_BACKEND", "DATA_PARALLEL_BACKEND")
# These options of several machines mean nothing on one: torch's launchers set these names for their own ends.
MULTI_NODE_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# The user spreads the model by these settings. Where he sets one of them, nothing is chosen for him.
PARALLEL_SIZES = ("TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE", "DATA_PARALLEL_SIZE")


class Cluster(NamedTuple):
    """`is_replicated` means that each machine has whole models (data parallelism), else a part. `port` is rank 0's,
    where the parts keep together, or the replicas shake hands. `environ` ranks below what the user set."""

    nodes: int
    rank: int
    leader: str
    port: int
    is_replicated: bool
    environ: Mapping[str, str]

    @property
    def is_headless(self) -> bool:
        return self.rank > 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.nodes}"


def count_nodes(environ: Mapping[str, str]) -> int:
    text = environ.get("NUM_NODES", "").strip()
    return max(1, int(text)) if text.isdecimal() else 1


def derive(environ: Mapping[str, str], user_sources: Sequence[Source]) -> Source:
    """Returns the options that a cluster's variables stand for. What the user says himself goes before them."""
    backends = [str(hits[0].value).strip() for name in BACKENDS if (hits := find_all(user_sources, name))]
    if (nodes := count_nodes(environ)) < 2 or RAY in backends:
        return {}
    sizes = {name: str(hits[0].value).strip() for name in PARALLEL_SIZES if (hits := find_all(user_sources, name))}
    replicas = sizes.get("DATA_PARALLEL_SIZE", "1")
    # An option -> the variable that says it, and the option's value, where it is not the variable's as it stands.
    if replicas.isdecimal() and int(replicas) > 1:  # whole models on each machine, behind rank 0
        share, rank = max(1, int(replicas) // nodes), environ.get("NODE_RANK", "")
        rows = {
            "DATA_PARALLEL_SIZE_LOCAL": ("NUM_NODES", str(share)),
            "DATA_PARALLEL_ADDRESS": ("PRIMARY_ADDR" if environ.get("PRIMARY_ADDR") else "MASTER_ADDR", ""),
            "DATA_PARALLEL_RPC_PORT": ("NUM_NODES", CLUSTER_HANDSHAKE_PORT),
        }
        if rank.isdecimal() and int(rank):
            rows["DATA_PARALLEL_START_RANK"] = ("NODE_RANK", str(int(rank) * share))
    else:  # MASTER_ADDR, MASTER_PORT and NODE_RANK are vLLM's own names
        rows = {"NNODES": ("NUM_NODES", ""), "MASTER_ADDR": ("PRIMARY_ADDR", ""), "MASTER_PORT": ("PRIMARY_PORT", "")}
        # GPUs of one machine are near each other; between machines one hop is few. `auto` means all GPUs of a machine.
        if sizes.keys() <= {"TENSOR_PARALLEL_SIZE"} and sizes.get("TENSOR_PARALLEL_SIZE", "auto").lower() in AUTO_WORDS:
            rows |= {"PIPELINE_PARALLEL_SIZE": ("NUM_NODES", ""), "TENSOR_PARALLEL_SIZE": ("NUM_TRAINERS", "")}
    return {
        option: Entry(f"environment {name}={environ[name]}", value or environ[name])
        for option, (name, value) in rows.items()
        if environ.get(name)
    }


def find_cluster(facts: Facts, report: Report) -> Cluster | None:
    """Returns the cluster that the effective options describe, if any. What can't be is reported as a problem."""
    nodes, replicas = facts.integer("NNODES", 1), facts.integer("DATA_PARALLEL_SIZE", 1)
    share = max(1, facts.integer("DATA_PARALLEL_SIZE_LOCAL", replicas))
    if RAY in [facts[name].value for name in BACKENDS]:
        return None  # there is one vLLM, and Ray starts its workers wherever Ray runs
    if nodes > 1:  # each machine has a part of one model
        rank, port, variable = facts.integer("NODE_RANK", 0), facts.integer("MASTER_PORT", MASTER_PORT), "MASTER_ADDR"
        gpus = facts.integer("TENSOR_PARALLEL_SIZE", 1) * facts.integer("PIPELINE_PARALLEL_SIZE", 1) * replicas
        if gpus % nodes:
            report.problems.append(
                f"NNODES={nodes}: a model spread over {gpus} GPUs (TENSOR_PARALLEL_SIZE x PIPELINE_PARALLEL_SIZE) "
                f"can't be shared out among {nodes} machines: set them so that {nodes} divides their product"
            )
    elif replicas > share and not any(facts[f"DATA_PARALLEL_{kind}_LB"].value for kind in ("HYBRID", "EXTERNAL")):
        nodes, rank = -(-replicas // share), facts.integer("DATA_PARALLEL_START_RANK", 0) // share
        port, variable = facts.integer("DATA_PARALLEL_RPC_PORT", HANDSHAKE_PORT), "DATA_PARALLEL_ADDRESS"
        if replicas % count_nodes(facts.environ):
            report.problems.append(
                f"DATA_PARALLEL_SIZE={replicas}: so many whole models can't be shared out among "
                f"{count_nodes(facts.environ)} machines: set a multiple of their number"
            )
    else:
        return None
    if rank >= nodes:
        report.problems.append(f"NODE_RANK={rank}: of {nodes} machines the last one has rank {nodes - 1}")
    leader = facts[variable].value
    if not leader:
        report.problems.append(f"{variable} is not set: on each machine, set it to the address of the one with rank 0")
        return None
    return Cluster(nodes, rank, str(leader), port, variable != "MASTER_ADDR", _network_env(str(leader), facts.environ))


def _network_env(leader: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns this machine's address among the others, and its network: gloo and NCCL guess, and guess loopback."""
    own_address = environ.get("NODE_ADDR", "").partition("/")[0].strip() or _outgoing_address(leader)
    if not own_address:
        return {}
    import psutil  # noqa: PLC0415  # 20 ms, for clusters only

    variables = {"VLLM_HOST_IP": own_address}
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == own_address for address in addresses):
            variables |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return variables


def _outgoing_address(leader: str) -> str:
    """Returns the address that this machine has towards another, or an empty text. Nothing is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(leader, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError):  # it is no name of a host, such as "./x"
        return ""
