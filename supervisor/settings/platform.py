"""What the machine and the platform around us are and allow. What does not fit is told in checks.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from supervisor.settings.sources import Found

# RunPod's limits, from its documentation.
RUNPOD_START = 420.0  # seconds until a worker must be ready, where RUNPOD_INIT_TIMEOUT is not set
BALANCER_REQUEST = 330.0  # seconds that the load balancer gives a request
BALANCER_BODY = 30_000_000  # bytes

# The port that SageMaker asks for. It sets it where containers share an endpoint; entrypoint.sh does so elsewhere.
# One of these is on each machine of RunPod's.
RUNPODS = ("RUNPOD_ENDPOINT_ID", "RUNPOD_POD_ID")
SAGEMAKER_PORT = "SAGEMAKER_BIND_TO_PORT"
SAGEMAKER_MODEL = Path("/opt/ml/model")  # what it has fetched from S3

LOOPBACK = ("localhost", "::1")
AUTO = ("auto", "all")  # TENSOR_PARALLEL_SIZE: every GPU that there is
TORCH_OFF = ("", "-1", "NoDevFiles")


def gpus(environ: Mapping[str, str]) -> int | None:
    """How many GPUs vLLM will see; None where that can't be told without asking a driver."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return 0 if visible.strip() in TORCH_OFF else len([part for part in visible.split(",") if part.strip()])
    nodes = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return len(nodes) or None


def defaults(mode: str, environ: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    """The platform's own defaults for the supervisor's settings, and what they are called."""
    if mode == "queue":
        # A failed worker is better off telling the cause in each job than in a loop of starts that are paid for.
        return "default of queue mode", {"SUPERVISOR_ON_FAILURE": "serve", "SUPERVISOR_MAX_CONCURRENCY": "30"}
    if environ.get("RUNPOD_ENDPOINT_ID"):
        return "default on RunPod's load balancer", {
            "SUPERVISOR_MAX_BODY": "30MB",
            # It counts a worker as there from its first 200 on, and sends it what waited.
            "SUPERVISOR_WARM_UP": "true",
        }
    if environ.get(SAGEMAKER_PORT):
        # Of the 30 s between its SIGTERM and its SIGKILL, vLLM's own end needs some.
        return "default on SageMaker", {"PORT": environ[SAGEMAKER_PORT], "SUPERVISOR_DRAIN_TIMEOUT": "15"}
    return "", {}


def model(environ: Mapping[str, str]) -> list[Found]:
    """The folder that the platform has put a model into, with its source, where there is one."""
    fetched = any((SAGEMAKER_MODEL / name).exists() for name in ("config.json", "params.json"))
    if environ.get(SAGEMAKER_PORT) and fetched:
        return [Found("default on SageMaker", str(SAGEMAKER_MODEL))]
    return []
