"""The checks of the machine: GPU, driver, memory, folders, port, and what is installed. None of them changes anything,
and none imports torch or vLLM: what their files say is enough."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from supervisor import listen, status
from supervisor.around.machine import amount, disk, nearest_folder
from supervisor.doctor.patient import FAIL, OK, WARN, Patient, Row
from supervisor.settings import volume
from supervisor.settings.settings import SettingsError
from supervisor.vllm import catalogue, installed

SMALL_SHM = 1 << 30
DEFAULT_SHM = 64 << 20  # Docker gives this much where nobody asks for more
SHM_REMEDY = (
    "Start the container with --ipc=host or --shm-size=8g (Kubernetes: an emptyDir with medium: Memory on /dev/shm)."
)
Pick = Callable[[Patient], Path | None]
CLASH_REMEDY = "Each overwrites the other's files: give vllm-supervisor an environment of its own."


def check_vllm(patient: Patient) -> Row | None:
    try:
        found = patient.vllm
    except installed.VllmError as error:
        return None if str(error) in patient.problems else Row(FAIL, str(error))
    description = f"vLLM {found.version} at {found.command[0]}"
    if found.version == installed.PINNED:
        return Row(OK, f"{description}, the version that this supervisor is tested with")
    if (catalogue.FLAGS / f"{found.version}.json").exists():
        return Row(OK, f"{description}, whose options are known")
    text = f"{description}: this supervisor is tested with {installed.PINNED}"
    return Row(WARN, text, "Its options are asked of it; most will do.")


def check_packages(patient: Patient) -> Row:
    """Checks for PyPI's unrelated `supervisor`: vLLM's dependencies bring it, and its package has the name of ours."""
    with contextlib.suppress(installed.VllmError):
        for pattern in ("vllm_supervisor-*.dist-info", "__editable__*vllm_supervisor*"):
            for folder in installed.find_beside(Path(patient.vllm.command[0]), pattern):
                text = f"vllm-supervisor is installed in vLLM's own environment ({folder.parent})"
                return Row(FAIL, f"{text}, where another package is named supervisor", CLASH_REMEDY)
    return find_clash(sys.path)


def find_clash(folders: list[str]) -> Row:
    for folder in folders:
        for name in ("supervisor-*.dist-info", "supervisor-*.egg-info"):
            for path in Path(folder or ".").glob(name):
                text = f"an unrelated package named supervisor is installed beside this one ({path})"
                return Row(FAIL, text, CLASH_REMEDY)
    return Row(OK, "no other package named supervisor is in the way")


def check_gpus(patient: Patient) -> Row:  # noqa: PLR0911  # a rule each
    count, selection = len(patient.gpus.get("gpus") or ()), patient.environ.get("CUDA_VISIBLE_DEVICES", "")
    if error := patient.gpus.get("error"):
        return Row(FAIL, f"a GPU does not answer ({error})", "Start the machine anew, or take another one.")
    for word in map(str.strip, selection.split(",") if count else ()):
        if word.isdecimal() and int(word) >= count:  # CUDA then uses those before it, and says nothing
            text = f"CUDA_VISIBLE_DEVICES={selection} names GPU {word}, which is not here"
            return Row(FAIL, text, "They are counted from 0: `nvidia-smi -L` lists them.")
    if patient.gpu_count:
        names = ", ".join(f"{each['name']} with {amount(each['total'])}" for each in patient.visible_gpus)
        return Row(OK, f"{patient.gpu_count} to be seen" + (f": {names}" if names else ""))
    if patient.torch_cuda == "":
        return Row(OK, "none, and none is needed: vLLM's torch is built for the CPU")
    if count:
        return Row(FAIL, "CUDA_VISIBLE_DEVICES hides every GPU", "Remove it.")
    if patient.machine.is_in_container(patient.environ):
        remedy = "--gpus all (compose: deploy.resources.reservations.devices; Kubernetes: nvidia.com/gpu: 1)"
        return Row(FAIL, "no GPU is to be seen in this container", f"Start it with {remedy}.")
    return Row(OK, "none here: fine for a try with the stand-in or vLLM's CPU build")


def check_gpu_memory(patient: Patient) -> Row | None:
    share = patient.utilization
    each = max(patient.visible_gpus, key=lambda each: each["used"] / each["total"], default=None)
    if each is None:
        return None
    text = f"{amount(each['used'])} of {amount(each['total'])} are in use"
    if each["used"] <= (each["total"] - each.get("reserved", 0)) * (1 - share):
        return Row(OK, text)
    remedy = "End what uses it (`nvidia-smi` names it; a running supervisor is fine), or lower GPU_MEMORY_UTILIZATION."
    return Row(WARN, f"{text}, and vLLM wants {share:g} of it", remedy)


def check_driver(patient: Patient) -> Row | None:
    """Checks that the driver takes what vLLM's torch is built for, by the driver's own word. Within a major version of
    CUDA it does, but for what only it can compile (NVIDIA's "minor version compatibility")."""
    version, cuda = patient.machine.driver_version() or patient.gpus.get("driver"), patient.torch_cuda
    if not version:
        return None  # the check of the GPUs tells it
    text = f"NVIDIA driver {version}"
    if cuda == "":
        return Row(WARN, f"{text}, and vLLM's torch is built for the CPU", "Install vLLM's CUDA build.")
    max_cuda = patient.gpus.get("cuda")
    if not cuda or not max_cuda:
        return Row(OK, f"{text}; which CUDA {'it takes' if cuda else 'torch is built for'} can't be told")
    text = f"{text} takes CUDA up to {max_cuda}, and vLLM's torch is built for {cuda}"
    remedy = "Update the host's driver, or use an image for an older CUDA (docs/doctor.md#the-driver)."
    if parse_version(max_cuda) >= parse_version(cuda):
        return Row(OK, text)
    if parse_version(max_cuda)[0] == parse_version(cuda)[0]:
        text += ": kernels that are shipped as PTX are refused (unsupported toolchain)"
        return Row(WARN, text, remedy)
    compatible = patient.environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "").strip().lower() in ("1", "true")
    return Row(WARN if compatible else FAIL, text, remedy)


def parse_version(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def check_shared_memory(patient: Patient) -> Row:
    total = disk(patient.machine.shm).get("total") if patient.machine.shm.is_dir() else None
    if not isinstance(total, int):
        return Row(FAIL, "there is no /dev/shm, by which vLLM's processes talk", SHM_REMEDY)
    text = f"{total >> 20} MiB"
    if total < SMALL_SHM and max(patient.gpu_count, patient.rank_count) > 1:
        return Row(FAIL, f"{text}, too little for several GPUs", SHM_REMEDY)
    if total <= DEFAULT_SHM:
        return Row(WARN, f"{text}, a container's default: a few crashes may fill it", SHM_REMEDY)
    return Row(OK, text)


def check_memory(patient: Patient) -> Row | None:
    limit, total = patient.machine.cgroup().get("limit"), patient.machine.memory().get("total")
    budget = min((each for each in (limit, total) if each), default=None)
    if budget is None:
        return None
    text = f"{amount(budget)}" + (", the container's limit" if budget == limit else "")
    if patient.weight_bytes and budget < patient.weight_bytes:
        text += f", less than the weights' {amount(patient.weight_bytes)}: vLLM may be killed while it loads"
        return Row(FAIL if patient.torch_cuda == "" else WARN, text, "Give the container more memory.")
    return Row(OK, text)


def check_port(patient: Patient) -> Row | None:
    if patient.settings is None:
        return None
    try:
        listeners = listen.bind(patient.settings)
    except SettingsError as error:
        with contextlib.suppress(status.StatusError):
            for each in status.ask_local(patient.environ):
                return Row(WARN, f"{error}; a supervisor runs here: {status.summary(each)}", "One of them is enough.")
        return Row(FAIL, str(error), "Something else listens there: stop it, or set another PORT.")
    sockets = [*listeners.gateway, *([listeners.simulator] if listeners.simulator else [])]
    text = ", ".join(listen.address(listener) for listener in sockets)
    for listener in sockets:
        listener.close()
    return Row(OK, f"free: {text}" if text else "none is needed for RunPod's queue")


def check_write(pick: Pick, remedy: str, verdict: str, patient: Patient, *, for_code: bool = False) -> Row | None:
    """Checks by trying that a folder, or the nearest above it, can be written; `for_code`: that code can run there."""
    if (folder := pick(patient)) is None:
        return None
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        return Row(verdict, f"{folder} can't be made: {nearest} is no folder", remedy)
    if not volume.can_write(nearest):
        return Row(verdict, f"{folder} can't be written", remedy)
    if for_code and disk(folder).get("noexec"):
        return Row(verdict, f"{folder} is mounted noexec: what vLLM compiles there can't be loaded", remedy)
    free = disk(folder).get("free")
    return Row(OK, f"{folder}" + (f", {amount(free)} free" if isinstance(free, int) else ""))
