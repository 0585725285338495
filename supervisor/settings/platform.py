"""What the machine and the platform around us are and allow. What does not fit is told in checks.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from supervisor.settings.sources import Found, Source

# The port that SageMaker asks for. It sets it where containers share an endpoint; entrypoint.sh does so elsewhere.
SAGEMAKER_PORT = "SAGEMAKER_BIND_TO_PORT"
SAGEMAKER_MODEL = Path("/opt/ml/model")  # what it has fetched from S3
ON_SAGEMAKER = "default on SageMaker"

AUTO = ("auto", "all")  # TENSOR_PARALLEL_SIZE: every GPU that there is
TORCH_OFF = ("", "-1", "NoDevFiles")


def gpus(environ: Mapping[str, str]) -> int | None:
    """How many GPUs vLLM will see; None where that can't be told without asking a driver."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return 0 if visible.strip() in TORCH_OFF else len([part for part in visible.split(",") if part.strip()])
    nodes = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return len(nodes) or None


def defaults(mode: str, environ: Mapping[str, str]) -> Source:
    """The platform's own defaults for the supervisor's settings."""
    if mode == "queue":
        # A failed worker is better off telling the cause in each job than in a loop of starts that are paid for.
        where, own = "default of queue mode", {"SUPERVISOR_ON_FAILURE": "serve", "SUPERVISOR_MAX_CONCURRENCY": "30"}
    elif environ.get("RUNPOD_ENDPOINT_ID"):
        # It counts a worker as there from its first 200 on, and sends it what waited.
        where, own = "default on RunPod's load balancer", {"SUPERVISOR_MAX_BODY": "30MB", "SUPERVISOR_WARM_UP": "true"}
    elif port := environ.get(SAGEMAKER_PORT):
        # Of the 30 s between its SIGTERM and its SIGKILL, vLLM's own end needs some.
        where, own = ON_SAGEMAKER, {"PORT": port, "SUPERVISOR_DRAIN_TIMEOUT": "15"}
    else:
        return {}
    return {variable: Found(where, value) for variable, value in own.items()}


def model(environ: Mapping[str, str]) -> Source:
    """The folder that the platform has put a model into, where there is one."""
    fetched = any((SAGEMAKER_MODEL / name).exists() for name in ("config.json", "params.json"))
    return {"MODEL": Found(ON_SAGEMAKER, str(SAGEMAKER_MODEL))} if environ.get(SAGEMAKER_PORT) and fetched else {}
