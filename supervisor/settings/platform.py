"""What the machine and the platform around us allow, and the settings that do not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

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


def computed(variable: str, given: object, environ: Mapping[str, str]) -> str | None:
    """The value that `auto` stands for, where vLLM has no such word."""
    if variable == "TENSOR_PARALLEL_SIZE" and str(given).strip().lower() in AUTO:
        return str(gpus(environ) or 1)
    return None


def balanced(environ: Mapping[str, str]) -> bool:
    """RunPod's load balancer: it may give its workers a queue's address as well."""
    return bool(environ.get("PORT_HEALTH") or environ.get("HEALTH_CHECK_PATH"))


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


def model(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """The folder that the platform has put a model into, with its source, where there is one."""
    fetched = any((SAGEMAKER_MODEL / name).exists() for name in ("config.json", "params.json"))
    if environ.get(SAGEMAKER_PORT) and fetched:
        return [("default on SageMaker", str(SAGEMAKER_MODEL))]
    return []


def warnings(
    environ: Mapping[str, str],
    mode: str,
    values: Mapping[str, tuple[object, str]],
) -> list[str]:
    """What will not work as it is set. `values`: variable -> (value, where it came from)."""
    found = []

    def value(variable: str) -> float:
        given = values.get(variable, (None, ""))[0]
        return float(given) if isinstance(given, int | float | str) and re.fullmatch(r"[\d.]+", str(given)) else 0.0

    if environ.get("RUNPOD_ENDPOINT_ID") or environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        asked = environ.get("RUNPOD_INIT_TIMEOUT", "")
        limit = float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else RUNPOD_START
        startup = value("SUPERVISOR_STARTUP_TIMEOUT")
        if startup > limit:
            found.append(
                f"RunPod gives a worker {limit:g} s to become ready (RUNPOD_INIT_TIMEOUT), and "
                f"SUPERVISOR_STARTUP_TIMEOUT is {startup:g} s: set RUNPOD_INIT_TIMEOUT={startup:g} on the endpoint"
            )
    if mode == "http" and environ.get("RUNPOD_ENDPOINT_ID"):
        if (seconds := value("SUPERVISOR_REQUEST_TIMEOUT")) > BALANCER_REQUEST:
            found.append(
                f"RunPod's load balancer ends a request after {BALANCER_REQUEST:g} s, before "
                f"SUPERVISOR_REQUEST_TIMEOUT={seconds:g} does: for longer answers use a queue endpoint"
            )
        if (size := value("SUPERVISOR_MAX_BODY")) > BALANCER_BODY:
            found.append(
                f"RunPod's load balancer takes bodies of up to 30 MB, less than SUPERVISOR_MAX_BODY={size:.0f} bytes: "
                "send larger files by URL"
            )
    if values.get("SUPERVISOR_JOB_OUTPUT", ("openai", ""))[0] != "tokens":
        found += [
            f"{values[name][1].removeprefix('environment ')} has no effect: streams are passed on event by event, and "
            "only SUPERVISOR_JOB_OUTPUT=tokens collects them into batches"
            for name in ("SUPERVISOR_JOB_BATCH_SIZE", "SUPERVISOR_JOB_MIN_BATCH_SIZE", "SUPERVISOR_JOB_BATCH_GROWTH")
            if name in values and values[name][1] != "default"
        ]
    host = str(values.get("SUPERVISOR_HOST", ("127.0.0.1", ""))[0])
    local = host in LOOPBACK or host.startswith("127.")
    keys = values.get("SUPERVISOR_API_KEYS", (None, ""))[0]
    guarded = environ.get("RUNPOD_ENDPOINT_ID") or environ.get(SAGEMAKER_PORT)  # by keys of the platform's own
    if mode == "http" and not local and not keys and not guarded:
        found.append(
            f"everybody who reaches {host} may use the model: set SUPERVISOR_API_KEYS, or SUPERVISOR_HOST=127.0.0.1"
        )
    prefix, source = values.get("ENABLE_PREFIX_CACHING", (True, ""))
    if prefix is False and source.startswith("environment"):
        found.append(
            "ENABLE_PREFIX_CACHING=false makes chats and shared prompts slower; it is a default of worker-vllm's "
            "template: remove it, unless you mean it"
        )
    available = gpus(environ)
    tensor, pipeline = value("TENSOR_PARALLEL_SIZE") or 1, value("PIPELINE_PARALLEL_SIZE") or 1
    if (
        available
        and tensor * pipeline > available
        and value("NNODES") <= 1
        and values.get("DISTRIBUTED_EXECUTOR_BACKEND", ("", ""))[0] != "ray"
    ):
        asked = f"TENSOR_PARALLEL_SIZE={tensor:g}" + (f" x PIPELINE_PARALLEL_SIZE={pipeline:g}" if pipeline > 1 else "")
        one = "1 GPU is" if available == 1 else f"{available} GPUs are"
        found.append(f"{asked}: only {one} here; set TENSOR_PARALLEL_SIZE=auto to use what there is")
    return found
