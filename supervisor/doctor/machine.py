"""The checks of the machine: GPU, driver, memory, folders, port, and what is installed. None of them changes anything,
and none imports torch or vLLM: what their files say is enough.
"""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from supervisor import status, up
from supervisor.doctor.patient import FAIL, OK, UTILIZATION, WARN, Patient, Row
from supervisor.engine.machine import amount, disk, nearest
from supervisor.settings import catalogue, vllm, volume
from supervisor.settings.sources import SettingsError

# The oldest driver (Linux) that CUDA's releases run with, from NVIDIA's release notes: by minor version compatibility
# for the whole of a major version, and the one that each came with. Between the two, code that is compiled on the
# GPU's machine (PTX, which Triton and FlashInfer make) is refused.
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580"}
DRIVERS = {
    "12.0": "525.60.13", "12.1": "530.30.02", "12.2": "535.54.03", "12.3": "545.23.06", "12.4": "550.54.14",
    "12.5": "555.42.02", "12.6": "560.28.03", "12.8": "570.26", "12.9": "575.51.03", "13.0": "580.65.06",
    "13.1": "590.44.01",
}  # fmt: skip
DRIVERS = {
    "12.0": "525.60.13", "12.1": "530.30.02", "12.2": "535.54.03", "12.3": "545.23.06", "12.4": "550.54.14",
    "12.5": "555.42.02", "12.6": "560.28.03", "12.8": "570.26", "12.9": "575.51.03", "13.0": "580.65.06",
    "13.1": "590.44.01",
}  # fmt: skip
SMALL_SHM = 1 << 30
# What Docker gives where nobody asks for more.
DEFAULT_SHM = 64 << 20
# A stream of a client takes two descriptors.
FEW_FILES = 4096
SHM = "/dev/shm"  # noqa: S108  # named, not used
ROOM = "Start the container with --ipc=host or --shm-size=8g (Kubernetes: an emptyDir with medium: Memory on /dev/shm)."


def engine(patient: Patient) -> Row | None:
    try:
        found = patient.vllm
    except vllm.VllmError as error:
        return None if str(error) in patient.problems else Row(FAIL, str(error))
    where = f"vLLM {found.version} at {found.command[0]}"
    if found.version == vllm.PINNED:
        return Row(OK, f"{where}, the version that this supervisor is tested with")
    if (catalogue.FLAGS / f"{found.version}.json").exists():
        return Row(OK, f"{where}, whose options are known")
    return Row(
        WARN, f"{where}: this supervisor is tested with {vllm.PINNED}", "Its options are asked of it; most will do."
    )


def gpus(patient: Patient) -> Row:
    found = patient.gpus
    if found is not None and found.get("error"):
        return Row(FAIL, f"a GPU does not answer ({found['error']})", "Start the machine anew, or take another one.")
    if patient.count:
        names = ", ".join(f"{each['name']} with {amount(each['total'])}" for each in (found or {}).get("gpus") or ())
        return Row(OK, f"{patient.count} to be seen" + (f": {names}" if names else ""))
    if patient.cuda == "":
        return Row(OK, "none, and none is needed: vLLM's torch is built for the CPU")
    if "CUDA_VISIBLE_DEVICES" in patient.environ and found is not None and found["gpus"]:
        return Row(FAIL, "CUDA_VISIBLE_DEVICES hides every GPU", "Remove it.")
    if patient.machine.in_container(patient.environ):
        return Row(
            FAIL,
            "no GPU is to be seen in this container",
            "Start it with --gpus all (compose: deploy.resources.reservations.devices; Kubernetes: nvidia.com/gpu: 1).",
        )
    return Row(OK, "none here: fine for a try with the stand-in or vLLM's CPU build")


def gpu_memory(patient: Patient) -> Row | None:
    share = float(patient.option("gpu_memory_utilization", UTILIZATION))
    each = max((patient.gpus or {}).get("gpus") or (), key=lambda each: each["used"] / each["total"], default=None)
    if each is None:
        return None
    said = f"{amount(each['used'])} of {amount(each['total'])} are in use"
    if each["used"] <= each["total"] * (1 - share):
        return Row(OK, said)
    return Row(
        WARN,
        f"{said}, and vLLM wants {share:g} of it",
        "End what uses it (`nvidia-smi` names it; a supervisor that runs is fine), or lower GPU_MEMORY_UTILIZATION.",
    )


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def driver(patient: Patient) -> Row | None:
    found = patient.machine.driver() or (patient.gpus or {}).get("driver") or ""
    if not found:
        return None  # the check of the GPUs tells
    cuda = patient.cuda
    if cuda is None:
        return Row(OK, f"NVIDIA driver {found}; for which CUDA vLLM's torch is built can't be told")
    if not cuda:
        return Row(WARN, f"NVIDIA driver {found}, and vLLM's torch is built for the CPU", "Install vLLM's CUDA build.")
    return driver_for(found, cuda)


def driver_for(found: str, cuda: str) -> Row:
    """Pure: a driver's version against CUDA's."""
    oldest = OLDEST_DRIVER.get(numbers(cuda)[0])
    known = DRIVERS.get(".".join(cuda.split(".")[:2]), oldest)
    if oldest is not None and numbers(found) < numbers(oldest):
        return Row(
            FAIL,
            f"NVIDIA driver {found} is too old: vLLM's torch is built for CUDA {cuda}, which needs {oldest} or later",
            "Update the host's driver, or use an image for an older CUDA; on data center GPUs "
            "VLLM_ENABLE_CUDA_COMPATIBILITY=1 may do.",
        )
    if known is not None and numbers(found) < numbers(known):
        return Row(
            WARN,
            f"NVIDIA driver {found} is older than {known}, which came with CUDA {cuda}: code that is compiled at the "
            "start may be refused",
            "Update the host's driver; ENFORCE_EAGER=true may help until then.",
        )
    return Row(OK, f"NVIDIA driver {found} is new enough for CUDA {cuda}")


def shared_memory(patient: Patient) -> Row:
    total = disk(patient.machine.shm).get("total") if patient.machine.shm.is_dir() else None
    if not isinstance(total, int):
        return Row(FAIL, "there is no /dev/shm, by which vLLM's processes talk", ROOM)
    said = f"{SHM} has {total >> 20} MiB"
    spread = int(patient.option("tensor_parallel_size", 1)) * int(patient.option("pipeline_parallel_size", 1))
    if total < SMALL_SHM and max(patient.count, spread) > 1:
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
        return Row(
            FAIL if patient.cuda == "" else WARN,
            f"{said}, less than the weights' {amount(patient.size)}: vLLM may be killed while it loads",
            "Give the container more memory.",
        )
    return Row(OK, said)


def files(patient: Patient) -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return Row(
            WARN,
            f"{soft} files may be open, two for each request",
            "Start with --ulimit nofile=65536:65536" + (f", or `ulimit -n {hard}`." if hard > soft else "."),
        )
    return Row(OK, f"{soft} files may be open; a raised memlock limit is not needed")


def port(patient: Patient) -> Row | None:
    if patient.settings is None:
        return None
    try:
        listeners = up.bind(patient.settings)
    except SettingsError as error:
        with contextlib.suppress(status.StatusError):
            for each in status.here(patient.environ):
                return Row(WARN, f"{error}; a supervisor runs here: {status.text(each)}", "One of them is enough.")
        return Row(FAIL, str(error), "Something else listens there: stop it, or set another PORT.")
    bound = [*listeners.gateway, *([listeners.simulator] if listeners.simulator else [])]
    said = ", ".join(up.address(listener) for listener in bound)
    for listener in bound:
        listener.close()
    return Row(OK, f"free: {said}" if said else "none is needed for RunPod's queue")


def writable(
    pick: Callable[[Patient], Path | None], what: str, remedy: str, verdict: str, patient: Patient
) -> Row | None:
    """By trying, in the nearest folder that is there."""
    folder = pick(patient)
    if folder is None:
        return None
    there = nearest(folder)
    if not there.is_dir():
        return Row(verdict, f"{what} can't be in {folder}: {there} is no folder", remedy)
    if not volume.can_write(there):
        return Row(verdict, f"{what} can't be written: {folder}", remedy)
    return Row(OK, f"{what} can be written: {folder}")


def disk_volume(patient: Patient) -> Row | None:
    found = patient.settings.volume if patient.settings is not None else None
    if found is None:
        return None
    free = disk(found.path).get("free")
    said = f"{found.path}" + (f", {amount(free)} free" if isinstance(free, int) else "")
    if not found.writable:
        return Row(WARN, f"{said}: it is read-only", "Mount it writable, or downloads and caches last for one start.")
    return Row(OK, said)


def clash(patient: Patient) -> Row:
    """PyPI's unrelated `supervisor`, which vLLM's dependencies bring, has a package of the same name as ours."""
    if patient.site is not None:
        ours = [*patient.site.glob("vllm_supervisor-*.dist-info"), *patient.site.glob("__editable__*vllm_supervisor*")]
        if ours:
            return Row(
                FAIL,
                f"vllm-supervisor is installed in vLLM's own environment ({patient.site}), where another package is "
                "named supervisor",
                "Remove it there (pip uninstall vllm-supervisor supervisor), and give it an environment of its own.",
            )
    return clash_among(sys.path)


def clash_among(folders: Sequence[str]) -> Row:
    for folder in folders:
        for name in ("supervisor-*.dist-info", "supervisor-*.egg-info"):
            for found in Path(folder or ".").glob(name):
                return Row(
                    FAIL,
                    f"an unrelated package named supervisor is installed beside this one ({found})",
                    "Each overwrites the other's files: give vllm-supervisor an environment of its own.",
                )
    return Row(OK, "no other package named supervisor is in the way")
