"""The checks of the model: the hub, our token, the disk and the GPUs' memory for its weights."""

from __future__ import annotations

from supervisor.around.machine import amount, disk
from supervisor.doctor.patient import FAIL, OK, WARN, Patient, Row

# What a download needs beside the weights, for it is written whole before it gets its name; and caches.
SPARE_DISK = 2_000_000_000


def hub(patient: Patient) -> Row:
    if patient.offline:
        return Row(OK, "not asked: HF_HUB_OFFLINE is set")
    found, endpoint = patient.hub.hello(), patient.hub.endpoint
    if not found.status:
        needed = patient.weights is None or (patient.weights.download and patient.weights.folder is None)
        said = f"{endpoint} does not answer ({found.why})" + ("" if needed else "; the weights are here")
        remedy = "set HF_ENDPOINT for a mirror, HF_HUB_OFFLINE=1 where there is none."
        return Row(FAIL if needed else WARN, said, f"Check the network and HTTPS_PROXY; {remedy}")
    if patient.hub.token and found.status in (401, 403):
        return Row(FAIL, f"{endpoint} refuses the token", "Set HF_TOKEN to one that is valid, or remove it.")
    if found.status >= 500:
        return Row(WARN, f"{endpoint} is in trouble (status {found.status})", "Try again later.")
    user = found.content.get("name") if isinstance(found.content, dict) and patient.hub.token else None
    return Row(OK, f"{endpoint} answers" + (f"; the token is {user}'s" if user else ", without a token"))


def access(patient: Patient) -> Row | None:
    """Whether the hub lets us have the model."""
    found, has_token = patient.remote, bool(patient.hub.token)
    if found is None or not found.status or patient.settings is None:
        return None
    if has_token and patient.hub.hello().status == 401:
        return None  # whatever is asked with that token: the check of the hub tells
    name = patient.settings.model.value
    if found.status == 200 and isinstance(found.content, dict) and found.content.get("gated"):
        found = patient.hub.ask(f"/api/models/{name}/auth-check")
    if found.status == 200:
        return Row(OK, f"{name} may be downloaded")
    said = f"{name} may not be downloaded (status {found.status}{': ' + found.why if found.why else ''})"
    if found.status not in (401, 403, 404):
        return Row(WARN, said, "Try again later.")
    remedy = "the token's account must have access, and have accepted its terms." if has_token else "set HF_TOKEN."
    return Row(FAIL, said, f"Check the name and REVISION; for a private or gated model {remedy}")


def model_disk(patient: Patient) -> Row | None:  # noqa: PLR0911  # a rule each
    if patient.settings is None or patient.weights is None:
        return None
    name = patient.settings.model.value
    if patient.weights.folder is not None or not patient.weights.download:
        return Row(OK, f"{name}: {patient.weights.source}")
    if patient.offline:
        remedy = "Unset it, or run `supervisor fetch` before."
        return Row(FAIL, f"{name} is not here, and HF_HUB_OFFLINE is set", remedy)
    space = disk(patient.downloads)
    size, free = patient.size, space.get("free")
    if size is None or not isinstance(free, int):
        return None  # the check of the model's access tells
    said = f"{name} takes {amount(size)}, and {amount(free)} are free in {space['folder']}"
    if free < size:
        return Row(FAIL, said, "Make room, or set HF_HOME (or SUPERVISOR_VOLUME) to a larger disk.")
    if free < size + SPARE_DISK:
        return Row(WARN, f"{said}: little is left for caches", "Make room, or set HF_HOME to a larger disk.")
    return Row(OK, said)


def weights(patient: Patient) -> Row | None:
    """Whether the weights fit into the GPUs' memory. What else vLLM takes of it, it measures when it starts, and says
    what to change."""
    size, totals = patient.size, [int(each["total"] - each.get("reserved", 0)) for each in patient.visible]
    if not totals or not size:
        return None
    usable = min(totals) * patient.utilization
    mine = size / patient.ranks
    said = f"{amount(mine)} of weights for a GPU of which vLLM may use {amount(usable)}"
    if mine < usable:
        return Row(OK, said)
    return Row(FAIL, said, "Use more GPUs (TENSOR_PARALLEL_SIZE), larger ones, or a quantized model.")
