"""Several machines: what a cluster's variables become, and what can't be."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor import explain
from supervisor.serve import headless_refusal
from supervisor.settings.command import build
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather

# As an Instant Cluster of RunPod sets them (docs.runpod.io/instant-clusters/configuration), on its second machine.
RUNPOD = {
    "NUM_NODES": "2",
    "NODE_RANK": "1",
    "NUM_TRAINERS": "8",
    "NODE_ADDR": "10.65.0.3",
    "PRIMARY_ADDR": "10.65.0.2",
    "PRIMARY_PORT": "29500",
    "MASTER_ADDR": "10.65.0.2",
    "MASTER_PORT": "29500",
    "HOST_NODE_ADDR": "10.65.0.2:29500",
    "WORLD_SIZE": "16",
}
REPLICAS_BY_HAND = {
    "DATA_PARALLEL_SIZE": "2",
    "DATA_PARALLEL_SIZE_LOCAL": "1",
    "DATA_PARALLEL_ADDRESS": "127.0.0.1",
}
BY_HAND = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


def read(folder: Path, environ: dict[str, str], *vllm_args: str, mode: str | None = None) -> Settings:
    arguments = Arguments(model="m", vllm_args=vllm_args, mode=mode)
    return gather(arguments, {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")} | environ)


def options(settings: Settings) -> dict[str, str]:
    return {setting.name: str(setting.value) for _, setting in (*settings.options, *settings.raw_options)}


def problems(folder: Path, environ: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        read(folder, environ)
    return "\n".join(caught.value.problems)


# fmt: off
SPREAD = [
    ("RunPod's own: the parts of a layer within a machine, one part of the model on each", RUNPOD,
     {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29500",
      "PIPELINE_PARALLEL_SIZE": "2", "TENSOR_PARALLEL_SIZE": "8"}),
    ("older names alone", {"NUM_NODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.65.0.2", "NUM_TRAINERS": "1"},
     {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.65.0.2", "PIPELINE_PARALLEL_SIZE": "4",
      "TENSOR_PARALLEL_SIZE": "1"}),
    ("the user's own sizes are respected", RUNPOD | {"TENSOR_PARALLEL_SIZE": "16"},
     {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29500",
      "TENSOR_PARALLEL_SIZE": "16"}),
    ("also the other one", RUNPOD | {"PIPELINE_PARALLEL_SIZE": "4"},
     {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29500",
      "PIPELINE_PARALLEL_SIZE": "4"}),
    ("`auto` is all GPUs of a machine", RUNPOD | {"TENSOR_PARALLEL_SIZE": "auto", "CUDA_VISIBLE_DEVICES": "0,1"},
     {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29500",
      "PIPELINE_PARALLEL_SIZE": "2", "TENSOR_PARALLEL_SIZE": "2"}),
    ("by hand", BY_HAND | {"TENSOR_PARALLEL_SIZE": "2"},
     {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "TENSOR_PARALLEL_SIZE": "2"}),
    ("by hand beats RunPod's", RUNPOD | {"NNODES": "4", "MASTER_PORT": "1234", "TENSOR_PARALLEL_SIZE": "4"},
     {"NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "1234",
      "TENSOR_PARALLEL_SIZE": "4"}),
    ("whole models on each machine", RUNPOD | {"DATA_PARALLEL_SIZE": "4"},
     {"DATA_PARALLEL_SIZE": "4", "DATA_PARALLEL_SIZE_LOCAL": "2", "DATA_PARALLEL_ADDRESS": "10.65.0.2",
      "DATA_PARALLEL_RPC_PORT": "13345", "DATA_PARALLEL_START_RANK": "2"}),
    ("with several GPUs each, on rank 0", RUNPOD | {"DATA_PARALLEL_SIZE": "4", "TENSOR_PARALLEL_SIZE": "4",
                                                    "NODE_RANK": "0"},
     {"DATA_PARALLEL_SIZE": "4", "DATA_PARALLEL_SIZE_LOCAL": "2", "DATA_PARALLEL_ADDRESS": "10.65.0.2",
      "DATA_PARALLEL_RPC_PORT": "13345", "TENSOR_PARALLEL_SIZE": "4"}),
    ("Ray spreads by itself", RUNPOD | {"DISTRIBUTED_EXECUTOR_BACKEND": "ray", "TENSOR_PARALLEL_SIZE": "16"},
     {"DISTRIBUTED_EXECUTOR_BACKEND": "ray", "TENSOR_PARALLEL_SIZE": "16"}),
]
# fmt: on


@pytest.mark.parametrize(("environ", "expected"), [row[1:] for row in SPREAD], ids=[row[0] for row in SPREAD])
def test_a_clusters_variables_become_options(folder: Path, environ: dict[str, str], expected: dict[str, str]) -> None:
    assert options(read(folder, environ)) == expected


@pytest.mark.parametrize(
    "environ", [RUNPOD, RUNPOD | {"DATA_PARALLEL_SIZE": "4"}, BY_HAND | {"PIPELINE_PARALLEL_SIZE": "2"}]
)
def test_nothing_is_said_about_them(folder: Path, environ: dict[str, str]) -> None:
    assert read(folder, environ | {"SUPERVISOR_HOST": "127.0.0.1"}).warnings == ()


@pytest.mark.parametrize(
    ("environ", "rank", "port", "replicas"),
    [
        (RUNPOD, 1, 29500, False),
        (RUNPOD | {"NODE_RANK": "0"}, 0, 29500, False),
        (BY_HAND | {"TENSOR_PARALLEL_SIZE": "2"}, 1, 29501, False),  # vLLM's own port
        (RUNPOD | {"DATA_PARALLEL_SIZE": "4"}, 1, 13345, True),
        (REPLICAS_BY_HAND, 0, 29550, True),  # the same
    ],
)  # fmt: skip
def test_which_rank_this_is(folder: Path, environ: dict[str, str], rank: int, port: int, replicas: bool) -> None:
    cluster = read(folder, environ).cluster
    assert cluster is not None
    assert (cluster.nodes, cluster.rank, cluster.is_headless) == (2, rank, rank > 0)
    assert (cluster.port, cluster.is_replicated) == (port, replicas)
    assert cluster.name == f"rank {rank} of 2"


def test_vllms_own_arguments_say_it_too(folder: Path) -> None:
    raw = ("--nnodes=2", "--node-rank", "1", "--master-addr", "127.0.0.1", "-tp", "2")
    cluster = read(folder, {}, *raw).cluster
    assert cluster is not None
    assert cluster.name == "rank 1 of 2"


@pytest.mark.parametrize(
    "environ",
    [
        {"DATA_PARALLEL_SIZE": "4"},  # on one machine
        {
            "DATA_PARALLEL_SIZE": "4",
            "DATA_PARALLEL_SIZE_LOCAL": "2",
            "DATA_PARALLEL_HYBRID_LB": "true",
        },  # its own front
        {"DATA_PARALLEL_SIZE": "4", "DATA_PARALLEL_SIZE_LOCAL": "2", "DATA_PARALLEL_BACKEND": "ray"},
        {"NUM_NODES": "1", "NUM_TRAINERS": "8"},
        {"NUM_NODES": "0"},
        {"NUM_NODES": "²"},  # a digit, and no number to Python
    ],
)
def test_no_cluster(folder: Path, environ: dict[str, str]) -> None:
    assert read(folder, environ).cluster is None


# The command


def command(settings: Settings) -> list[str]:
    return list(build(settings, "SOCKET", "FOLDER").argv[1:])


def test_rank_0_serves_and_the_others_do_not(folder: Path) -> None:
    first = command(read(folder, RUNPOD | {"NODE_RANK": "0"}))
    assert first[:4] == ["serve", "m", "--uds", "SOCKET"]
    assert "--headless" not in first
    assert first[first.index("--node-rank") + 1] == "0"
    other = command(read(folder, RUNPOD))
    assert other[:3] == ["serve", "m", "--headless"]
    assert "--uds" not in other
    assert other[other.index("--node-rank") + 1] == "1"
    assert other[other.index("--nnodes") + 1] == "2"


def test_a_replicas_machine_is_headless_without_nnodes(folder: Path) -> None:
    found = command(read(folder, RUNPOD | {"DATA_PARALLEL_SIZE": "4"}))
    assert "--headless" in found
    assert found[found.index("--data-parallel-start-rank") + 1] == "2"
    assert not {"--nnodes", "--node-rank", "--master-addr"} & set(found)


def test_no_job_is_taken_but_by_rank_0(folder: Path) -> None:
    assert read(folder, RUNPOD, mode="queue").mode == "http"
    assert read(folder, RUNPOD | {"NODE_RANK": "0"}, mode="queue").mode == "queue"


def test_where_requests_belong(folder: Path) -> None:
    refusal = headless_refusal(read(folder, RUNPOD))
    assert refusal is not None
    text = "This is rank 1 of 2: rank 0, at 10.65.0.2, serves the model."
    assert (refusal.status, refusal.code, refusal.message) == (503, "not_rank_0", text)
    assert headless_refusal(read(folder, RUNPOD | {"NODE_RANK": "0"})) is None
    assert headless_refusal(read(folder, {})) is None


# The network


def test_vllm_is_told_its_address_and_its_network(folder: Path) -> None:
    """It would guess, and guess loopback, which the other machines can't reach."""
    loopback = next(
        name for name, rows in psutil.net_if_addrs().items() if any(row.address == "127.0.0.1" for row in rows)
    )
    settings = read(folder, BY_HAND | {"TENSOR_PARALLEL_SIZE": "2"})
    environ = build(settings, "SOCKET", "FOLDER").environ
    assert environ["VLLM_HOST_IP"] == "127.0.0.1"  # the way to rank 0
    assert environ["GLOO_SOCKET_IFNAME"] == environ["NCCL_SOCKET_IFNAME"] == loopback


def test_the_cluster_says_which_address_it_is(folder: Path) -> None:
    settings = read(folder, RUNPOD | {"NODE_ADDR": "10.65.0.3/24"})  # of no network here
    assert settings.cluster is not None
    assert settings.cluster.environ == {"VLLM_HOST_IP": "10.65.0.3"}


def test_what_the_user_says_of_the_network_stands(folder: Path) -> None:
    own = {"VLLM_HOST_IP": "10.9.9.9", "NCCL_SOCKET_IFNAME": "ens1"}
    environ = build(read(folder, BY_HAND | {"TENSOR_PARALLEL_SIZE": "2"} | own), "SOCKET", "FOLDER").environ
    assert own.items() <= environ.items()


def test_rank_0_that_has_no_name_yet_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's name is not known before the pod runs; torch asks for it again and again."""

    def unknown(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    settings = read(folder, BY_HAND | {"TENSOR_PARALLEL_SIZE": "2", "MASTER_ADDR": "llm-0.llm-ranks"})
    assert settings.cluster is not None
    assert settings.cluster.environ == {}


def test_an_address_that_can_be_nobodys_ends_no_start(folder: Path) -> None:
    settings = read(folder, BY_HAND | {"TENSOR_PARALLEL_SIZE": "2", "MASTER_ADDR": "./llm-0"})
    assert settings.cluster is not None
    assert settings.cluster.environ == {}


# One machine


@pytest.mark.parametrize("more", [{}, {"NNODES": "1"}, {"NUM_NODES": "1"}])
def test_one_machine_drops_what_launchers_say_of_several(folder: Path, more: dict[str, str]) -> None:
    environ = {"MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29500", "NODE_RANK": "0"}
    settings = read(folder, environ | more)
    assert options(settings) == {name: "1" for name in more if name == "NNODES"}
    assert settings.warnings == ()
    assert settings.cluster is None


def test_another_rank_without_a_number_of_machines_is_told(folder: Path) -> None:
    settings = read(folder, {"MASTER_ADDR": "10.65.0.2", "NODE_RANK": "1"})
    assert options(settings) == {}
    (warning,) = settings.warnings
    assert "NODE_RANK has no effect" in warning
    assert "NNODES (or NUM_NODES)" in warning


def test_what_is_said_on_purpose_is_not_dropped(folder: Path) -> None:
    """In a file or as an argument nobody but the user has set it."""
    (folder / "config.yaml").write_text("supervisor:\nmaster_port: 1234\n")
    assert options(read(folder, {}, "--master-addr", "10.0.0.9")) == {"MASTER_PORT": "1234", "MASTER_ADDR": "10.0.0.9"}


# Bad input


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (RUNPOD | {"NODE_RANK": "2"}, "NODE_RANK=2: of 2 machines the last one has rank 1"),
        (RUNPOD | {"NODE_RANK": "one"}, "NODE_RANK=one (environment NODE_RANK): expected a whole number"),
        ({"NNODES": "2", "NODE_RANK": "1", "TENSOR_PARALLEL_SIZE": "2"}, "MASTER_ADDR is not set: on each machine"),
        ({"NUM_NODES": "2", "DATA_PARALLEL_SIZE": "2"}, "DATA_PARALLEL_ADDRESS is not set: on each machine"),
        (BY_HAND, "a model spread over 1 GPUs"),
        (BY_HAND | {"TENSOR_PARALLEL_SIZE": "3"}, "can't be shared out among 2 machines"),
        (RUNPOD | {"DATA_PARALLEL_SIZE": "3"}, "so many whole models can't be shared out among 2"),
        (RUNPOD | {"NNODES": "0"}, "NNODES=0 (environment NNODES)"),
        (RUNPOD | {"PRIMARY_PORT": "high", "MASTER_PORT": ""}, "MASTER_PORT=high (environment PRIMARY_PORT=high)"),
    ],
)  # fmt: skip
def test_what_can_not_be(folder: Path, environ: dict[str, str], expected: str) -> None:
    assert expected in problems(folder, environ)


def test_headless_is_not_the_users_to_set(folder: Path) -> None:
    (warning,) = read(folder, {"HEADLESS": "true"}).warnings
    assert "set NNODES, NODE_RANK, MASTER_ADDR" in warning


# explain


def test_explain_shows_where_it_came_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain.show(read(folder, RUNPOD | {"DATA_PARALLEL_SIZE": "4"}), as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert rows["DATA_PARALLEL_SIZE_LOCAL"]["source"] == "environment NUM_NODES=2"
    assert rows["DATA_PARALLEL_START_RANK"]["source"] == "environment NODE_RANK=1"
    explain.show(read(folder, {**RUNPOD, "MASTER_ADDR": "", "NNODES": "4"}), as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert rows["MASTER_ADDR"]["source"] == "environment PRIMARY_ADDR=10.65.0.2"
    assert rows["PIPELINE_PARALLEL_SIZE"]["source"] == "environment NUM_NODES=2"
    assert rows["NNODES"] == {
        "name": "NNODES", "value": "4", "source": "environment NNODES", "overrode": ["environment NUM_NODES=2: 2"],
    }  # fmt: skip
