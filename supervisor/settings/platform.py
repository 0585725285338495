"""What the machine and the platform around us are and allow. What does not fit is told in checks.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from supervisor.settings.sources import Found, Source, beneath

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
    """The platform's own defaults for the supervisor's settings, and the folder that it has put a model into."""
    port = environ.get(SAGEMAKER_PORT)
    fetched = port and any((SAGEMAKER_MODEL / name).exists() for name in ("config.json", "params.json"))
    model = {"MODEL": Found(ON_SAGEMAKER, str(SAGEMAKER_MODEL))} if fetched else {}
    if mode == "queue":
        return model | beneath("default of queue mode")
    if environ.get("RUNPOD_ENDPOINT_ID"):
        return model | beneath("default on RunPod's load balancer")
    return model | {"PORT": Found(ON_SAGEMAKER, port)} | beneath(ON_SAGEMAKER) if port else {}
