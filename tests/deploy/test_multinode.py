"""The manifests for one model on several nodes: their parts fit each other, and what the supervisor does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from supervisor.serve import CLOSE_PATIENCE, TERMINATE_PATIENCE
from supervisor.settings.settings import Arguments, Settings, gather

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes-multinode"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
NAME = {"app.kubernetes.io/name": "llm"}
RANK = "apps.kubernetes.io/pod-index"  # set by Kubernetes on each pod of a StatefulSet


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


SET = load("stateful-set")["spec"]
POD = SET["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRON = {row["name"]: row for row in CONTAINER["env"]}


def settings(folder: Path, rank: int) -> Settings:
    (folder / "keys").write_text("the-only-key\n")
    given = {
        "NODE_RANK": str(rank), "NODE_ADDR": f"10.0.0.{rank + 1}", "HF_TOKEN": "hf_secret",
        "SUPERVISOR_API_KEYS": f"@{folder / 'keys'}", "SUPERVISOR_VOLUME": str(folder),
    }  # fmt: skip
    environ = {name: given.get(name) or row["value"] for name, row in ENVIRON.items()}
    vllm = str(folder.parent / "vllm/bin/vllm")
    return gather(Arguments(), environ | {"SUPERVISOR_VLLM": vllm, "SUPERVISOR_HOST": "0.0.0.0"})


@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_takes_it(name: str) -> None:
    kubernetes_validate.validate(load(name), "1.33", strict=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_pod_is_a_rank(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [])  # no name is asked for: NODE_ADDR is there
    read = settings(folder, rank)
    assert read.warnings == ()
    assert read.cluster is not None
    assert (read.cluster.name, read.cluster.leader) == (f"rank {rank} of {SET['replicas']}", "llm-0.llm-ranks")
    assert read.cluster.environ == {"VLLM_HOST_IP": f"10.0.0.{rank + 1}"}
    gpus = int(CONTAINER["resources"]["limits"]["nvidia.com/gpu"])
    assert int(ENVIRON["TENSOR_PARALLEL_SIZE"]["value"]) == gpus
    assert int(ENVIRON["PIPELINE_PARALLEL_SIZE"]["value"]) == SET["replicas"] == int(ENVIRON["NNODES"]["value"])


def test_what_a_pod_knows_of_itself() -> None:
    assert ENVIRON["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.labels['{RANK}']"
    assert ENVIRON["NODE_ADDR"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"


def test_the_parts_name_each_other() -> None:
    assert SET["selector"]["matchLabels"] == SET["template"]["metadata"]["labels"] == NAME
    ranks, service = load("ranks"), load("service")
    assert ranks["metadata"]["name"] == SET["serviceName"]
    assert ranks["spec"]["selector"] == NAME
    assert ENVIRON["MASTER_ADDR"]["value"] == f"{load('stateful-set')['metadata']['name']}-0.{SET['serviceName']}"
    assert service["spec"]["selector"] == NAME | {RANK: "0"}
    (port,) = CONTAINER["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    volumes = {
        volume["name"] for volume in (*POD["volumes"], *(row["metadata"] for row in SET["volumeClaimTemplates"]))
    }
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes


def test_pods_find_each_other_before_they_are_ready() -> None:
    ranks = load("ranks")["spec"]
    assert (ranks["clusterIP"], ranks["publishNotReadyAddresses"]) == ("None", True)
    assert SET["podManagementPolicy"] == "Parallel"


def test_times_fit_each_other(folder: Path) -> None:
    knobs = settings(folder, 0).knobs
    startup, liveness = CONTAINER["startupProbe"], CONTAINER["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > knobs.startup_timeout
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > knobs.drain_timeout
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] >= pause + knobs.drain_timeout + TERMINATE_PATIENCE + CLOSE_PATIENCE
