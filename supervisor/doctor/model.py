"""The checks of the model: the hub, our token, the disk and the GPUs' memory for its weights."""

from __future__ import annotations

from supervisor.around.machine import amount, disk
from supervisor.doctor.patient import FAIL, OK, WARN, Patient, Row

# A download needs so much beside the weights, for a file is written whole before it gets its name; and so do caches.
SPARE_DISK = 2_000_000_000


def check_hub(patient: Patient) -> Row:
    if patient.is_offline:
        return Row(OK, "not asked: HF_HUB_OFFLINE is set")
    answer, endpoint = patient.hub.whoami(), patient.hub.endpoint
    if not answer.status:
        is_needed = patient.weights is None or (patient.weights.needs_download and patient.weights.folder is None)
        text = f"{endpoint} does not answer ({answer.reason})" + ("" if is_needed else "; the weights are here")
        remedy = "set HF_ENDPOINT for a mirror, HF_HUB_OFFLINE=1 where there is none."
        return Row(FAIL if is_needed else WARN, text, f"Check the network and HTTPS_PROXY; {remedy}")
    if patient.hub.token and answer.status in (401, 403):
        return Row(FAIL, f"{endpoint} refuses the token", "Set HF_TOKEN to one that is valid, or remove it.")
    if answer.status >= 500:
        return Row(WARN, f"{endpoint} is in trouble (status {answer.status})", "Try again later.")
    user = answer.content.get("name") if isinstance(answer.content, dict) and patient.hub.token else None
    return Row(OK, f"{endpoint} answers" + (f"; the token is {user}'s" if user else ", without a token"))


def check_access(patient: Patient) -> Row | None:
    """Checks that the hub lets us have the model."""
    answer, has_token = patient.remote_model, bool(patient.hub.token)
    if answer is None or not answer.status or patient.settings is None:
        return None
    if has_token and patient.hub.whoami().status == 401:
        return None  # so it is with all questions that have this token: the check of the hub tells
    name = patient.settings.model.value
    if answer.status == 200 and isinstance(answer.content, dict) and answer.content.get("gated"):
        answer = patient.hub.ask(f"/api/models/{name}/auth-check")
    if answer.status == 200:
        return Row(OK, f"{name} may be downloaded")
    text = f"{name} may not be downloaded (status {answer.status}{': ' + answer.reason if answer.reason else ''})"
    if answer.status not in (401, 403, 404):
        return Row(WARN, text, "Try again later.")
    remedy = "the token's account must have access, and have accepted its terms." if has_token else "set HF_TOKEN."
    return Row(FAIL, text, f"Check the name and REVISION; for a private or gated model {remedy}")


def check_disk(patient: Patient) -> Row | None:  # noqa: PLR0911  # a rule each
    if patient.settings is None or patient.weights is None:
        return None
    name = patient.settings.model.value
    if patient.weights.folder is not None or not patient.weights.needs_download:
        return Row(OK, f"{name}: {patient.weights.source}")
    if patient.is_offline:
        remedy = "Unset it, or run `supervisor fetch` before."
        return Row(FAIL, f"{name} is not here, and HF_HUB_OFFLINE is set", remedy)
    space = disk(patient.download_path)
    size, free = patient.weight_bytes, space.get("free")
    if size is None or not isinstance(free, int):
        return None  # the check of the model's access tells it
    text = f"{name} takes {amount(size)}, and {amount(free)} are free in {space['folder']}"
    if free < size:
        return Row(FAIL, text, "Make room, or set HF_HOME (or SUPERVISOR_VOLUME) to a larger disk.")
    if free < size + SPARE_DISK:
        return Row(WARN, f"{text}: little is left for caches", "Make room, or set HF_HOME to a larger disk.")
    return Row(OK, text)


def check_weights(patient: Patient) -> Row | None:
    """Checks that the weights fit into the GPUs' memory. What else vLLM takes of it, vLLM measures when it starts, and
    then says what to change."""
    size, totals = patient.weight_bytes, [int(each["total"] - each.get("reserved", 0)) for each in patient.visible_gpus]
    if not totals or not size:
        return None
    usable = min(totals) * patient.utilization
    rank_bytes = size / patient.rank_count
    text = f"{amount(rank_bytes)} of weights for a GPU of which vLLM may use {amount(usable)}"
    if rank_bytes < usable:
        return Row(OK, text)
    return Row(FAIL, text, "Use more GPUs (TENSOR_PARALLEL_SIZE), larger ones, or a quantized model.")
