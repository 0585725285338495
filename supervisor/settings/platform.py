"""Finds out what the machine and the platform around us are and allow. checks.py tells what does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from supervisor.settings.sources import Entry, Source, presets

# The port that SageMaker asks for. It sets it where containers share an endpoint; entrypoint.sh does so elsewhere.
SAGEMAKER_PORT = "SAGEMAKER_BIND_TO_PORT"
SAGEMAKER_MODEL = Path("/opt/ml/model")  # what it has fetched from S3
SAGEMAKER_SOURCE = "default on SageMaker"

DEVICES = Path("/dev")
AUTO_WORDS = ("auto", "all")  # in TENSOR_PARALLEL_SIZE, they mean every GPU that there is
NO_DEVICES = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES, they hide all GPUs from torch


def count_gpus(environ: Mapping[str, str]) -> int | None:
    """Returns how many GPUs vLLM will see, and None where that can't be told without asking a driver."""
    devices = environ.get("CUDA_VISIBLE_DEVICES")
    if devices is not None:
        return 0 if devices.strip() in NO_DEVICES else len([part for part in devices.split(",") if part.strip()])
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in DEVICES.glob("nvidia*")) or None


def list_sizes(names: Container[str]) -> list[str]:
    """Returns the settings whose product is the number of GPUs that this machine needs. `names` are those that are set:
    a replica with a rank of its own is alone here, and several machines share the replicas."""
    replicas = "DATA_PARALLEL_SIZE_LOCAL" if "DATA_PARALLEL_SIZE_LOCAL" in names else "DATA_PARALLEL_SIZE"
    return ["TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE", *([] if "DATA_PARALLEL_RANK" in names else [replicas])]


def share_gpus(environ: Mapping[str, str], sources: Sequence[Source]) -> int:
    """Returns what TENSOR_PARALLEL_SIZE=auto means: this machine's GPUs, or the share of one part of the model."""
    texts = {name: str(said.value).strip() for each in reversed(sources) for name, said in each.items() if said.value}
    sizes = {name: int(texts[name]) for name in ("NNODES", *list_sizes(texts)) if texts.get(name, "").isdecimal()}
    has_ray = "ray" in (texts.get("DISTRIBUTED_EXECUTOR_BACKEND"), texts.get("DATA_PARALLEL_BACKEND"))
    gpu_count, nodes = count_gpus(environ) or 1, sizes.pop("NNODES", 1)
    return gpu_count if has_ray else max(1, min(gpu_count, gpu_count * nodes // (math.prod(sizes.values()) or 1)))


def defaults(mode: str, environ: Mapping[str, str]) -> Source:
    """Returns the platform's defaults for the supervisor's settings, and the folder that it has put a model into."""
    port = environ.get(SAGEMAKER_PORT)
    has_model = port and any((SAGEMAKER_MODEL / name).exists() for name in ("config.json", "params.json"))
    model = {"MODEL": Entry(SAGEMAKER_SOURCE, str(SAGEMAKER_MODEL))} if has_model else {}
    if mode == "queue":
        return model | presets("default of queue mode")
    if environ.get("RUNPOD_ENDPOINT_ID"):
        return model | presets("default on RunPod's load balancer")
    return model | {"PORT": Entry(SAGEMAKER_SOURCE, port)} | presets(SAGEMAKER_SOURCE) if port else {}
