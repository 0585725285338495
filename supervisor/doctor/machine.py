"""The checks of the machine: GPU, driver, memory, folders, port, and what is installed. None of them changes anything,
and none imports torch or vLLM: what their files say is enough.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from supervisor import listen, status
from supervisor.around.machine import amount, disk, nearest
from supervisor.doctor.patient import FAIL, OK, WARN, Patient, Row
from supervisor.settings import volume
from supervisor.settings.settings import SettingsError
from supervisor.vllm import catalogue, installed

SMALL_SHM = 1 << 30
# What Docker gives where nobody asks for more.
DEFAULT_SHM = 64 << 20
ROOM = "Start the container with --ipc=host or --shm-size=8g (Kubernetes: an emptyDir with medium: Memory on /dev/shm)."
ELSEWHERE = "Each overwrites the other's files: give vllm-supervisor an environment of its own."


def engine(patient: Patient) -> Row | None:
    try:
        found = patient.vllm
    except installed.VllmError as error:
        return None if str(error) in patient.problems else Row(FAIL, str(error))
    where = f"vLLM {found.version} at {found.command[0]}"
    if found.version == installed.PINNED:
        return Row(OK, f"{where}, the version that this supervisor is tested with")
    if (catalogue.FLAGS / f"{found.version}.json").exists():
        return Row(OK, f"{where}, whose options are known")
    said = f"{where}: this supervisor is tested with {installed.PINNED}"
    return Row(WARN, said, "Its options are asked of it; most will do.")


def clash(patient: Patient) -> Row:
    """PyPI's unrelated `supervisor`, which vLLM's dependencies bring, has a package of the same name as ours."""
    with contextlib.suppress(installed.VllmError):
        for pattern in ("vllm_supervisor-*.dist-info", "__editable__*vllm_supervisor*"):
            for found in installed.beside(Path(patient.vllm.command[0]), pattern):
                said = f"vllm-supervisor is installed in vLLM's own environment ({found.parent})"
                return Row(FAIL, f"{said}, where another package is named supervisor", ELSEWHERE)
    return clash_among(sys.path)


def clash_among(folders: list[str]) -> Row:
    for folder in folders:
        for name in ("supervisor-*.dist-info", "supervisor-*.egg-info"):
            for found in Path(folder or ".").glob(name):
                said = f"an unrelated package named supervisor is installed beside this one ({found})"
                return Row(FAIL, said, ELSEWHERE)
    return Row(OK, "no other package named supervisor is in the way")


def gpus(patient: Patient) -> Row:  # noqa: PLR0911  # a rule each
    here, asked = len(patient.gpus.get("gpus") or ()), patient.environ.get("CUDA_VISIBLE_DEVICES", "")
    if error := patient.gpus.get("error"):
        return Row(FAIL, f"a GPU does not answer ({error})", "Start the machine anew, or take another one.")
    for word in map(str.strip, asked.split(",") if here else ()):
        if word.isdecimal() and int(word) >= here:  # CUDA takes those before it, and says nothing
            said = f"CUDA_VISIBLE_DEVICES={asked} names GPU {word}, which is not here"
            return Row(FAIL, said, "They are counted from 0: `nvidia-smi -L` lists them.")
    if patient.count:
        names = ", ".join(f"{each['name']} with {amount(each['total'])}" for each in patient.visible)
        return Row(OK, f"{patient.count} to be seen" + (f": {names}" if names else ""))
    if patient.cuda == "":
        return Row(OK, "none, and none is needed: vLLM's torch is built for the CPU")
    if here:
        return Row(FAIL, "CUDA_VISIBLE_DEVICES hides every GPU", "Remove it.")
    if patient.machine.in_container(patient.environ):
        remedy = "--gpus all (compose: deploy.resources.reservations.devices; Kubernetes: nvidia.com/gpu: 1)"
        return Row(FAIL, "no GPU is to be seen in this container", f"Start it with {remedy}.")
    return Row(OK, "none here: fine for a try with the stand-in or vLLM's CPU build")


def gpu_memory(patient: Patient) -> Row | None:
    share = patient.utilization
    each = max(patient.visible, key=lambda each: each["used"] / each["total"], default=None)
    if each is None:
        return None
    said = f"{amount(each['used'])} of {amount(each['total'])} are in use"
    if each["used"] <= (each["total"] - each.get("reserved", 0)) * (1 - share):
        return Row(OK, said)
    remedy = (
        "End what uses it (`nvidia-smi` names it; a supervisor that runs is fine), or lower GPU_MEMORY_UTILIZATION."
    )
    return Row(WARN, f"{said}, and vLLM wants {share:g} of it", remedy)


def driver(patient: Patient) -> Row | None:
    """Whether it takes what vLLM's torch is built for, by its own word. Within a major version of CUDA it does, but for
    what only it can compile (NVIDIA's "minor version compatibility")."""
    found, cuda = patient.machine.driver() or patient.gpus.get("driver"), patient.cuda
    if not found:
        return None  # the check of the GPUs tells
    said = f"NVIDIA driver {found}"
    if cuda == "":
        return Row(WARN, f"{said}, and vLLM's torch is built for the CPU", "Install vLLM's CUDA build.")
    takes = patient.gpus.get("cuda")
    if not cuda or not takes:
        return Row(OK, f"{said}; which CUDA {'it takes' if cuda else 'torch is built for'} can't be told")
    said = f"{said} takes CUDA up to {takes}, and vLLM's torch is built for {cuda}"
    remedy = "Update the host's driver, or use an image for an older CUDA (docs/doctor.md#the-driver)."
    if numbers(takes) >= numbers(cuda):
        return Row(OK, said)
    if numbers(takes)[0] == numbers(cuda)[0]:
        said += ": kernels that are shipped as PTX are refused (unsupported toolchain)"
        return Row(WARN, said, remedy)
    compatible = patient.environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "").strip().lower() in ("1", "true")
    return Row(WARN if compatible else FAIL, said, remedy)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def shared_memory(patient: Patient) -> Row:
    total = disk(patient.machine.shm).get("total") if patient.machine.shm.is_dir() else None
    if not isinstance(total, int):
        return Row(FAIL, "there is no /dev/shm, by which vLLM's processes talk", ROOM)
    said = f"{total >> 20} MiB"
    if total < SMALL_SHM and max(patient.count, patient.ranks) > 1:
        return Row(FAIL, f"{said}, too little for several GPUs", ROOM)
    if total <= DEFAULT_SHM:
        return Row(WARN, f"{said}, a container's default: a few crashes may fill it", ROOM)
    return Row(OK, said)


def memory(patient: Patient) -> Row | None:
    limit, total = patient.machine.cgroup().get("limit"), patient.machine.memory().get("total")
    least = min((each for each in (limit, total) if each), default=None)
    if least is None:
        return None
    said = f"{amount(least)}" + (", the container's limit" if least == limit else "")
    if patient.size and least < patient.size:
        said += f", less than the weights' {amount(patient.size)}: vLLM may be killed while it loads"
        return Row(FAIL if patient.cuda == "" else WARN, said, "Give the container more memory.")
    return Row(OK, said)


def port(patient: Patient) -> Row | None:
    if patient.settings is None:
        return None
    try:
        listeners = listen.bind(patient.settings)
    except SettingsError as error:
        with contextlib.suppress(status.StatusError):
            for each in status.here(patient.environ):
                return Row(WARN, f"{error}; a supervisor runs here: {status.text(each)}", "One of them is enough.")
        return Row(FAIL, str(error), "Something else listens there: stop it, or set another PORT.")
    bound = [*listeners.gateway, *([listeners.simulator] if listeners.simulator else [])]
    said = ", ".join(listen.address(listener) for listener in bound)
    for listener in bound:
        listener.close()
    return Row(OK, f"free: {said}" if said else "none is needed for RunPod's queue")


def writable(pick: Callable[[Patient], Path | None], remedy: str, verdict: str, patient: Patient) -> Row | None:
    """By trying, in the nearest folder that is there."""
    if (folder := pick(patient)) is None:
        return None
    there = nearest(folder)
    if not there.is_dir():
        return Row(verdict, f"{folder} can't be made: {there} is no folder", remedy)
    if not volume.can_write(there):
        return Row(verdict, f"{folder} can't be written", remedy)
    free = disk(folder).get("free")
    return Row(OK, f"{folder}" + (f", {amount(free)} free" if isinstance(free, int) else ""))
