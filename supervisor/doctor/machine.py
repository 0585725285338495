"""The checks of the machine: GPU, driver, memory, folders, port, and what is installed. None of them changes anything,
and none imports torch or vLLM: what their files say is enough.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from supervisor import listen, status
from supervisor.around.machine import amount, disk, nearest
from supervisor.doctor.patient import FAIL, OK, UTILIZATION, WARN, Patient, Row
from supervisor.settings import volume
from supervisor.settings.settings import SettingsError
from supervisor.vllm import catalogue, installed

# From NVIDIA's CUDA Toolkit Release Notes, the columns for Linux. "CUDA Toolkit and Minimum Required Driver Version for
# CUDA Minor Version Compatibility": the oldest driver that the whole of a major version runs with. (The editions for
# 13.x have no more than the branches, 450, 525 and 580; the numbers for 11 and 12 are those of the editions for 12.x.)
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580"}
# "CUDA Toolkit and Corresponding Driver Versions": the one that each release (GA) came with. Between the two, binaries
# run, and PTX is refused, which the driver compiles: some of vLLM's kernels are shipped as nothing else for some GPUs.
# A release without a row is compared with the last one before it: the table has no 12.7, and from 13.4 on a toolkit
# comes without a driver. What is older than 11.8 is left out.
DRIVERS = {
    "11.8": "520.61.05", "12.0": "525.60.13", "12.1": "530.30.02", "12.2": "535.54.03", "12.3": "545.23.06",
    "12.4": "550.54.14", "12.5": "555.42.02", "12.6": "560.28.03", "12.8": "570.26", "12.9": "575.51.03",
    "13.0": "580.65.06", "13.1": "590.44.01", "13.2": "595.45.04", "13.3": "610.43.02",
}  # fmt: skip
LIBCUDA = "libcuda.so.1"
# By the names of the GPUs: what CUDA's forward compatibility is not made for, and that of which it takes a few only.
NO_COMPATIBILITY, RARE_COMPATIBILITY = re.compile(r"GeForce|TITAN"), re.compile(r"RTX|Quadro")
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
    except installed.VllmError as error:
        return None if str(error) in patient.problems else Row(FAIL, str(error))
    where = f"vLLM {found.version} at {found.command[0]}"
    if found.version == installed.PINNED:
        return Row(OK, f"{where}, the version that this supervisor is tested with")
    if (catalogue.FLAGS / f"{found.version}.json").exists():
        return Row(OK, f"{where}, whose options are known")
    return Row(
        WARN,
        f"{where}: this supervisor is tested with {installed.PINNED}",
        "Its options are asked of it; most will do.",
    )


def gpus(patient: Patient) -> Row:
    found = patient.gpus
    if (row := _unusable(patient)) is not None:
        return row
    if patient.count:
        names = ", ".join(f"{each['name']} with {amount(each['total'])}" for each in patient.visible)
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


def _unusable(patient: Patient) -> Row | None:
    """A GPU that should be there."""
    found = patient.gpus or {}
    if found.get("error"):
        return Row(FAIL, f"a GPU does not answer ({found['error']})", "Start the machine anew, or take another one.")
    here, asked = len(found.get("gpus") or ()), patient.environ.get("CUDA_VISIBLE_DEVICES", "")
    for word in asked.split(",") if here else ():
        if word.strip().isdecimal() and int(word) >= here:  # CUDA takes those before it, and says nothing
            said = f"CUDA_VISIBLE_DEVICES={asked} names GPU {word.strip()}, which is not here"
            return Row(FAIL, said, "They are counted from 0: `nvidia-smi -L` lists them.")
    return None


def gpu_memory(patient: Patient) -> Row | None:
    share = float(patient.option("gpu_memory_utilization", UTILIZATION))
    each = max(patient.visible, key=lambda each: each["used"] / each["total"], default=None)
    if each is None:
        return None
    said = f"{amount(each['used'])} of {amount(each['total'])} are in use"
    if each["used"] <= (each["total"] - each.get("reserved", 0)) * (1 - share):
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
    library = libcuda(patient, cuda)
    if library is None or library[1] == found:
        return driver_for(found, cuda)
    names = " ".join(str(each["name"]) for each in (patient.gpus or {}).get("gpus") or ())
    return driver_under(found, *library, cuda, names)


def driver_for(found: str, cuda: str, what: str = "NVIDIA driver") -> Row:
    """Pure: a driver's version against CUDA's."""
    major, minor = (*numbers(cuda), 0)[:2]
    oldest = OLDEST_DRIVER.get(major)
    if oldest is None:
        return Row(OK, f"{what} {found}; which one CUDA {cuda} needs is not known here")
    remedy = (
        "Update the host's driver, or use an image for an older CUDA; on data center GPUs "
        f"VLLM_ENABLE_CUDA_COMPATIBILITY=1 may do, where there is a /usr/local/cuda-{major}.{minor}/compat."
    )
    if numbers(found) < numbers(oldest):
        return Row(
            FAIL,
            f"{what} {found} is too old: vLLM's torch is built for CUDA {cuda}, which needs {oldest} or later",
            remedy,
        )
    releases = [each for each in DRIVERS if numbers(each)[0] == major and numbers(each) <= (major, minor)]
    release = max(releases, key=numbers, default=None)
    if release is not None and numbers(found) < numbers(DRIVERS[release]):
        return Row(
            WARN,
            f"{what} {found} is older than {DRIVERS[release]}, which came with CUDA {release}, and vLLM's torch is "
            f"built for CUDA {cuda}: kernels that are shipped as PTX are refused (unsupported toolchain)",
            remedy,
        )
    return Row(OK, f"{what} {found} is new enough for CUDA {cuda}")


def driver_under(found: str, folder: Path, version: str, cuda: str, names: str) -> Row:
    """Pure: a driver under a library that is not its own. That is what CUDA's forward compatibility (cuda-compat) is,
    and what a driver is until the machine is started anew after an update.
    """
    pair = f"libcuda {version} ({folder}, over NVIDIA driver {found})"
    remedy = (
        f"Update the host's driver (or start the host anew, if that was done), or keep {folder} from being found: by "
        "VLLM_ENABLE_CUDA_COMPATIBILITY, LD_LIBRARY_PATH or /etc/ld.so.conf.d."
    )
    if NO_COMPATIBILITY.search(names):
        return Row(FAIL, f"{pair} is loaded, and on GeForce GPUs CUDA refuses such a pair (error 804, or 803)", remedy)
    if numbers(version) < numbers(found):
        return Row(
            WARN, f"{pair} is loaded: it is the older of the two, and CUDA may refuse the pair (error 803)", remedy
        )
    row = driver_for(version, cuda, "libcuda")
    said = row.text.replace(f"libcuda {version}", pair, 1)
    if row.verdict == OK and RARE_COMPATIBILITY.search(names):
        return Row(WARN, f"{said}, but of RTX and Quadro GPUs few may run by it (errors 803, 804)", remedy)
    return Row(row.verdict, said, row.remedy)


def libcuda(patient: Patient, cuda: str) -> tuple[Path, str] | None:
    """The folder and the version of the driver's library that vLLM will load; None where its name does not tell. Looked
    for as vLLM (env_override.py) and the dynamic loader do.
    """
    environ, root = patient.environ, patient.machine.root
    folders: list[str] = []
    if environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "").strip().lower() in ("1", "true"):
        conda = environ.get("CONDA_PREFIX", "")
        asked = [
            environ.get("VLLM_CUDA_COMPATIBILITY_PATH", ""), conda and f"{conda}/cuda-compat",
            f"/usr/local/cuda-{cuda}/compat",
        ]  # fmt: skip
        folders += [each for each in asked if each and (root / each.lstrip("/")).is_dir()][:1]
    folders += [each for each in environ.get("LD_LIBRARY_PATH", "").split(":") if each]
    if (known := cached(root, LIBCUDA)) is not None:
        folders.append(str(known.parent))
    for folder in folders:
        library = root / folder.lstrip("/") / LIBCUDA
        if library.exists():
            version = library.resolve().name.removeprefix("libcuda.so.")
            # WSL's and Jetson's is `libcuda.so.1.1`.
            return (Path(folder), version) if numbers(version) > (2,) else None
    return None


def cached(root: Path, name: str) -> Path | None:
    """Where the dynamic loader finds a library of 64 bits by its cache, which is in the order of its search. (`ldconfig
    -p` says the same, where it is installed.)
    """
    with contextlib.suppress(OSError, ValueError, struct.error):
        data = (root / "etc/ld.so.cache").read_bytes()
        data = data[data.index(b"glibc-ld.so.cache1.1") :]  # behind one in an older format, maybe
        for index in range(struct.unpack_from("=I", data, 20)[0]):
            flags, key, value = struct.unpack_from("=iII", data, 48 + 24 * index)
            if flags & 0xFF00 and data[key : key + len(name) + 1] == name.encode() + b"\0":
                return Path(os.fsdecode(data[value : data.index(b"\0", value)]))
    return None


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
