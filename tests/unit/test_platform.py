"""What the platform allows, and the warnings where the settings ask for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.settings import platform
from supervisor.settings.sources import Arguments, Settings, gather

QUEUE = {"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_POD_ID": "p", "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/"}
BALANCER = {"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_POD_ID": "p", "PORT_HEALTH": "8001"}


def read(folder: Path, **environ: str) -> Settings:
    return gather(Arguments(model="m"), {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")} | environ)


@pytest.mark.parametrize(
    ("where", "environ", "expected"),
    [
        ({}, {}, []),
        ({}, {"SUPERVISOR_STARTUP_TIMEOUT": "9000", "SUPERVISOR_MAX_BODY": "1GiB"}, []),
        (QUEUE, {}, ["set RUNPOD_INIT_TIMEOUT=1200 on the endpoint"]),
        (QUEUE, {"RUNPOD_INIT_TIMEOUT": "1200"}, []),
        (QUEUE, {"RUNPOD_INIT_TIMEOUT": "800", "SUPERVISOR_STARTUP_TIMEOUT": "900"}, ["gives a worker 800 s"]),
        (QUEUE, {"SUPERVISOR_STARTUP_TIMEOUT": "420"}, []),
        (QUEUE, {"RUNPOD_INIT_TIMEOUT": "soon"}, ["gives a worker 420 s"]),
        (BALANCER, {"RUNPOD_INIT_TIMEOUT": "1200"}, ["ends a request after 330 s"]),
        (BALANCER, {"RUNPOD_INIT_TIMEOUT": "1200", "SUPERVISOR_REQUEST_TIMEOUT": "330"}, []),
        (
            BALANCER,
            {"RUNPOD_INIT_TIMEOUT": "1200", "REQUEST_TIMEOUT": "300", "SUPERVISOR_MAX_BODY": "64MiB"},
            ["takes bodies of up to 30 MB"],
        ),
        ({}, {"ENABLE_PREFIX_CACHING": "false"}, ["it is a default of worker-vllm's template"]),
        ({}, {"ENABLE_PREFIX_CACHING": "true"}, []),
        ({}, {"DISABLE_PREFIX_CACHING": "true"}, ["it is a default of worker-vllm's template"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"TENSOR_PARALLEL_SIZE": "2"}, []),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            {"TENSOR_PARALLEL_SIZE": "4"},
            ["TENSOR_PARALLEL_SIZE=4: only 2 GPUs are here"],
        ),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"SUPERVISOR_EXTRA_ARGS": "-tp 2"}, ["only 1 GPU is here"]),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            {"TENSOR_PARALLEL_SIZE": "2", "PIPELINE_PARALLEL_SIZE": "2"},
            ["TENSOR_PARALLEL_SIZE=2 x PIPELINE_PARALLEL_SIZE=2: only 2"],
        ),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"TENSOR_PARALLEL_SIZE": "2", "DISTRIBUTED_EXECUTOR_BACKEND": "ray"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"TENSOR_PARALLEL_SIZE": "2", "NNODES": "2"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"TENSOR_PARALLEL_SIZE": "auto"}, []),
    ],
)
def test_limits(folder: Path, where: dict[str, str], environ: dict[str, str], expected: list[str]) -> None:
    warnings = read(folder, **where, **environ).warnings
    assert len(warnings) == len(expected), warnings
    for text in expected:
        assert any(text in warning for warning in warnings)


def test_a_load_balancers_worker_takes_what_the_balancer_takes(folder: Path) -> None:
    settings = read(folder, **BALANCER)
    assert settings.knobs.max_body == 30_000_000
    (found,) = [setting for setting in settings.knob_settings if setting.name == "SUPERVISOR_MAX_BODY"]
    assert found.source == "default on RunPod's load balancer"
    assert not settings.asked_for("SUPERVISOR_MAX_BODY")


@pytest.mark.parametrize(
    ("visible", "expected"), [("0,1,2", "3"), ("0", "1"), ("", "1"), ("-1", "1"), ("GPU-aa,GPU-bb", "2"), (None, "2")]
)
def test_all_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str) -> None:
    nodes = [Path("/dev/nvidia0"), Path("/dev/nvidia1"), Path("/dev/nvidiactl"), Path("/dev/nvidia-uvm")]
    monkeypatch.setattr(platform.Path, "glob", lambda self, pattern: iter(nodes))
    monkeypatch.setattr("supervisor.settings.vllm._version_beside", lambda program: "0.32.0")
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    settings = read(folder, TENSOR_PARALLEL_SIZE="auto", **environ)
    assert settings.option("tensor_parallel_size") == expected
    (setting,) = [setting for _, setting in settings.options]
    assert setting.source == "environment TENSOR_PARALLEL_SIZE=auto"
