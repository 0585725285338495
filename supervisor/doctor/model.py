"""The checks of the model: the hub, our token, the clock, the disk for its weights, the memory for its context."""

from __future__ import annotations

import re
from collections.abc import Mapping

from supervisor.around import media as told
from supervisor.around import modalities
from supervisor.around.machine import amount, disk
from supervisor.doctor import estimate
from supervisor.doctor.patient import FAIL, OK, UTILIZATION, WARN, Patient, Row

# Seconds: what is signed (S3, tokens) is refused after some minutes.
SKEW, LARGE_SKEW = 30.0, 240.0
# What a download needs beside the weights, for it is written whole before it gets its name; and caches.
SPARE_DISK = 2_000_000_000
# Of a context that fits by our estimate, what is advised: vLLM's own profiling comes to some 1 % less now and then.
CAUTION = 0.98


def hub(patient: Patient) -> Row:
    if patient.offline:
        return Row(OK, "not asked: HF_HUB_OFFLINE is set")
    found, endpoint = patient.hub.hello(), patient.hub.endpoint
    if not found.status:
        needed = patient.weights is None or (patient.weights.download and patient.weights.folder is None)
        return Row(
            FAIL if needed else WARN,
            f"{endpoint} does not answer ({found.why})" + ("" if needed else "; the weights are here"),
            "Check the network and HTTPS_PROXY; set HF_ENDPOINT for a mirror, HF_HUB_OFFLINE=1 where there is none.",
        )
    if patient.hub.token and found.status in (401, 403):
        return Row(FAIL, f"{endpoint} refuses the token", "Set HF_TOKEN to one that is valid, or remove it.")
    if found.status >= 500:
        return Row(WARN, f"{endpoint} is in trouble (status {found.status})", "Try again later.")
    user = found.content.get("name") if isinstance(found.content, dict) and patient.hub.token else None
    return Row(OK, f"{endpoint} answers" + (f"; the token is {user}'s" if user else ", without a token"))


def access(patient: Patient) -> Row | None:
    """Whether the hub lets us have the model."""
    found, has_token = patient.remote, bool(patient.hub.token)
    if found is None or not found.status or patient.offline or patient.settings is None:
        return None
    if has_token and patient.hub.hello().status == 401:
        return None  # whatever is asked with that token: the check of the hub tells
    name = patient.settings.model.value
    if found.status == 200 and isinstance(found.content, dict) and found.content.get("gated"):
        found = patient.hub.ask(f"/api/models/{name}/auth-check")
    if found.status == 200:
        return Row(OK, f"{name} may be downloaded")
    said = f"{name} may not be downloaded (status {found.status}{': ' + found.why if found.why else ''})"
    if found.status in (401, 403, 404):
        remedy = "Check the name and REVISION; for a private or gated model " + (
            "the token's account must have access, and have accepted its terms." if has_token else "set HF_TOKEN."
        )
        return Row(FAIL, said, remedy)
    return Row(WARN, said, "Try again later.")


def clock(patient: Patient) -> Row | None:
    skew = None if patient.offline else patient.hub.hello().skew
    if skew is None:
        return None
    said = f"our clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the hub's"
    if abs(skew) > LARGE_SKEW:
        return Row(FAIL, f"{said}: signed downloads and tokens are refused", "Set the host's clock (NTP).")
    return Row(WARN, said, "Set the host's clock (NTP).") if abs(skew) > SKEW else Row(OK, "as the hub's")


def model_disk(patient: Patient) -> Row | None:
    if patient.settings is None or patient.weights is None:
        return None
    name = patient.settings.model.value
    if patient.weights.folder is not None or not patient.weights.download:
        return Row(OK, f"{name}: {patient.weights.source}")
    if patient.offline:
        return Row(
            FAIL, f"{name} is not here, and HF_HUB_OFFLINE is set", "Unset it, or run `supervisor fetch` before."
        )
    if patient.size is None:
        return None  # the check of the model's access tells
    return _room(str(name), patient.size, disk(patient.downloads))


def _room(name: str, size: int, space: Mapping[str, object]) -> Row | None:
    free = space.get("free")
    if not isinstance(free, int):
        return None
    said = f"{name} takes {amount(size)}, and {amount(free)} are free in {space['folder']}"
    if free < size:
        return Row(FAIL, said, "Make room, or set HF_HOME (or SUPERVISOR_VOLUME) to a larger disk.")
    if free < size + SPARE_DISK:
        return Row(WARN, f"{said}: little is left for caches", "Make room, or set HF_HOME to a larger disk.")
    return Row(OK, said)


def count(text: str) -> int:
    """`32k` as vLLM reads it; 0 for `auto`."""
    found = re.fullmatch(r"([\d.]+)([kmgtKMGT]?)", text)
    if found is None:
        return 0
    power = "kmgt".find(found[2].lower()) + 1 if found[2] else 0
    return int(float(found[1]) * (1000 if found[2].islower() else 1024) ** power)


def context(patient: Patient) -> Row | None:
    """Whether weights and a context of MAX_MODEL_LEN fit into the GPU's memory; an estimate."""
    totals = [int(each["total"] - each.get("reserved", 0)) for each in patient.visible]
    config = patient.config() if totals and patient.size else {}
    kv_dtype = str(patient.option("kv_cache_dtype", "auto"))
    found = estimate.layout(config, kv_dtype)
    if found is None or not patient.size:
        return None
    tokens = count(str(patient.option("max_model_len", ""))) or estimate.longest(config)
    fits = estimate.share(
        found,
        patient.size,
        min(totals),
        float(patient.option("gpu_memory_utilization", UTILIZATION)),
        tensor=int(patient.option("tensor_parallel_size", 1)),
        pipeline=int(patient.option("pipeline_parallel_size", 1)),
    )
    if not fits.fits:
        return Row(
            WARN,
            f"weights of {amount(fits.weights)} will hardly fit into {amount(fits.usable)} of a GPU (an estimate)",
            "Use more GPUs (TENSOR_PARALLEL_SIZE), a larger one, or a quantized model.",
        )
    if tokens and fits.tokens < tokens:
        safe = int(fits.tokens * CAUTION)
        return Row(
            WARN,
            f"a context of {tokens} tokens will not fit beside the weights; about {fits.tokens} will (an estimate)",
            f"Set MAX_MODEL_LEN={safe // 1024 * 1024 or safe}, "
            + ("" if kv_dtype.startswith("fp8") else "or KV_CACHE_DTYPE=fp8; ")
            + "or use more GPUs.",
        )
    return Row(OK, f"beside weights of {amount(fits.weights)} about {fits.tokens} tokens fit (an estimate)")


def media(patient: Patient) -> Row | None:
    """Whether vLLM fetches what a request names from anywhere."""
    if patient.settings is None:
        return None
    found = told.unrestricted(patient.settings, modalities.kinds(patient.config()))
    return Row(WARN, told.text(found), told.REMEDY) if found else None
