"""`supervisor doctor`: each thing that it finds, in a machine that has it; what can be real is real."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import venv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from supervisor.around.gpus import gpus as survey
from supervisor.around.machine import Machine
from supervisor.doctor import estimate, machine, model
from supervisor.doctor.checks import CHECKS
from supervisor.doctor.examine import admit, examine
from supervisor.doctor.patient import FAIL, OK, WARN, Patient, Row
from supervisor.settings.settings import Arguments
from tests.engine.conftest import Call
from tests.harness import DEMO, FAKE, ROOT, SUPERVISOR, Supervisor, clean_environment, http

GB = 1_000_000_000


class Hub:
    """The stand-in: `org/tiny` is the demo model, `org/gated` may be seen by all, `org/private` by its member."""

    def __init__(self, *more: str) -> None:
        repos = [word for name in ("tiny", "gated", "private") for word in ("--repo", f"org/{name}={DEMO}")]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/stand_in_hub.py"), *repos, "--gated", "org/gated",
             "--private", "org/private", *more],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.stop()


def rows(text: str) -> dict[str, dict[str, str]]:
    """By check; the worst of each."""
    order = (OK, WARN, FAIL)
    found: dict[str, dict[str, str]] = {}
    for row in json.loads(text)["checks"]:
        if row["check"] not in found or order.index(row["verdict"]) > order.index(found[row["check"]]["verdict"]):
            found[row["check"]] = row
    return found


Doctor = Callable[..., dict[str, dict[str, str]]]


@pytest.fixture
def doctor(tmp_path: Path, hub: Hub, call: Call) -> Doctor:
    """`supervisor doctor --json`, in this process."""

    def ask(*arguments: str, **environ: str) -> dict[str, dict[str, str]]:
        given = {"PORT": "0", "SUPERVISOR_VLLM": str(FAKE), "HOME": str(tmp_path), "HF_ENDPOINT": hub.url} | environ
        done = call("doctor", *(arguments or ("org/tiny",)), "--json", cwd=tmp_path, **given)
        assert done.stderr == ""
        found = rows(done.stdout)
        assert done.returncode == any(row["verdict"] == FAIL for row in found.values())
        return found

    return ask


def patient(folder: Path, *arguments: str, gpus: object = None, **environ: str) -> Patient:
    """Of a machine whose files are in `folder`."""
    given = Arguments(model=arguments[0] if arguments else None if "MODEL" in environ else str(DEMO))
    told = {"HOME": str(folder), "PATH": os.environ["PATH"], "PORT": "0", **environ}
    told.setdefault("SUPERVISOR_VLLM", a_vllm(folder / "its vllm", "'12.8'"))
    found = admit(given, told, Machine(folder), patience=60)
    return dataclasses.replace(found, ask_gpus=lambda: gpus)


def made(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def gpu(total: float = 80, used: int = 0) -> dict[str, Any]:
    return {"driver": "580.65.06", "gpus": [{"name": "NVIDIA X", "used": used * GB, "total": int(total * GB)}]}


def a_vllm(folder: Path, cuda: str, *more: str) -> str:
    """A `vllm` with a torch of that build beside it."""
    site = "lib/python3.12/site-packages"
    made(folder, {f"{site}/torch/version.py": f"__version__ = '2.13'\ncuda: Optional[str] = {cuda}\n",
                  f"{site}/vllm-0.32.0.dist-info/METADATA": "", "bin/vllm": "#!/bin/sh\n"}
         | {f"{site}/{name}": "" for name in more})  # fmt: skip
    (folder / "bin/vllm").chmod(0o755)
    return shlex.quote(str(folder / "bin/vllm"))


def a_torch(folder: Path, cuda: str) -> Path:
    """One that says so where it is imported."""
    imported = f"open({str(folder / 'imported')!r}, 'w')\n"
    return made(folder, {"torch/__init__.py": imported, "torch/version.py": f"cuda: Optional[str] = {cuda}\n"})


def an_environment(folder: Path, script: str = "#!{python}\n", *, system: bool = False) -> tuple[str, Path]:
    """A real one, and its packages' folder, with a vLLM but no torch in it."""
    venv.create(folder, symlinks=True, system_site_packages=system)
    site = next(folder.glob("lib/python3*/site-packages"))
    made(folder, {"bin/vllm": script.format(python=folder / "bin/python")})
    made(site, {"vllm/__init__.py": "", "vllm-0.32.0.dist-info/METADATA": ""})
    (folder / "bin/vllm").chmod(0o755)
    return str(folder / "bin/vllm"), site


# As a whole


def test_a_machine_that_is_well(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor(SUPERVISOR_VLLM=a_vllm(tmp_path, "None"), HF_TOKEN="hf_member")
    assert {row["check"]: row for row in found.values() if row["verdict"] != OK} == {}
    assert "the token is member's" in found["hub"]["found"]
    assert found["model"]["found"] == "org/tiny may be downloaded"
    assert "takes" in found["disk"]["found"]
    assert set(found) >= {"settings", "vllm", "packages", "gpu", "shm", "memory", "files", "port", "cache", "clock"}


def test_text_for_pipes_and_a_table_for_terminals(call: Call, tmp_path: Path, hub: Hub) -> None:
    environ = {"HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "MAX_NUM_SEQS": "many", "SUPERVISOR_VLLM": str(FAKE)}
    done = call("doctor", "org/tiny", cwd=tmp_path, PORT="0", **environ)
    assert done.returncode == 1
    assert "fail settings     MAX_NUM_SEQS=many (environment MAX_NUM_SEQS): expected a whole number" in done.stdout
    assert all(re.match(r"(ok|warn|fail) +\w+ ", line) for line in done.stdout.splitlines())
    shown = subprocess.run(
        ["script", "-qec", f"stty cols 80; {SUPERVISOR} doctor org/tiny", "/dev/null"],
        env=clean_environment(TERM="xterm", **environ),
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.stdout.replace("\r", "").splitlines()]
    assert "WHAT TO DO" in lines[0]
    assert "\x1b[" in shown.stdout
    assert max(map(len, lines)) <= 80
    assert shown.returncode == 1


def test_no_secret_is_shown(call: Call, tmp_path: Path, hub: Hub) -> None:
    environ = {"HF_TOKEN": "planted-token-1", "SUPERVISOR_API_KEYS": "planted-key-2", "DTYPE": "planted-key-2"}
    environ |= {"HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "SUPERVISOR_VLLM": str(FAKE), "PORT": "0"}
    for more in ((), ("--json",)):
        done = call("doctor", "org/tiny", *more, cwd=tmp_path, **environ)
        assert "planted" not in done.stdout + done.stderr
        assert "refuses the token" in done.stdout


def test_one_check_that_fails_and_one_that_hangs_do_not_end_the_others(tmp_path: Path) -> None:
    def broken(_: Patient) -> Row:
        raise ZeroDivisionError("ours")

    forever = threading.Event()
    checks = {"a": broken, "b": lambda _: forever.wait() and None, "c": lambda _: Row(OK, "fine"), "d": lambda _: None}
    found = examine(patient(tmp_path), checks, 0.2)
    forever.set()
    assert [(row.check, row.verdict) for row in found] == [("a", WARN), ("b", WARN), ("c", OK)]
    assert "ZeroDivisionError: ours" in found[0].text
    assert "no answer within" in found[1].text


def test_a_vllm_that_takes_long_to_be_asked(tmp_path: Path) -> None:
    made(tmp_path, {"vllm": "#!/bin/sh\nexec sleep 2\n"})
    (tmp_path / "vllm").chmod(0o755)
    given, environ = Arguments(model=str(DEMO)), {"HOME": str(tmp_path), "SUPERVISOR_VLLM": str(tmp_path / "vllm")}
    (problem,) = admit(given, environ, Machine(tmp_path), patience=0.2).problems
    assert "`supervisor explain` does that" in problem


# What can be real


def test_a_port_that_is_taken(doctor: Doctor, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        row = doctor(PORT=str(taken.getsockname()[1]), TMPDIR=str(tmp_path))["port"]
    assert row["verdict"] == FAIL
    assert "in use" in row["found"]


def test_a_port_that_is_taken_by_a_supervisor(doctor: Doctor, running: Supervisor) -> None:
    row = doctor(PORT=str(running.port), TMPDIR=str(Path(running.socket).parent.parent))["port"]
    assert row["verdict"] == WARN
    assert "a supervisor runs here: ready since" in row["found"]


def mounted(tmp_path: Path, hub: Hub, mounts: str, **environ: str) -> dict[str, dict[str, str]]:
    """In a mount namespace of its own."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounts need root")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", f"{mounts}; exec {SUPERVISOR} doctor org/tiny --json"],
        env=clean_environment(SUPERVISOR_VLLM=str(FAKE), PORT="0", HOME=str(tmp_path), HF_ENDPOINT=hub.url, **environ),
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return rows(done.stdout)


def test_a_small_shm(tmp_path: Path, hub: Hub) -> None:
    row = mounted(tmp_path, hub, "mount -t tmpfs -o size=64m x /dev/shm", CUDA_VISIBLE_DEVICES="0,1")["shm"]
    assert row["verdict"] == FAIL
    assert "has 64 MiB" in row["found"]
    assert "--shm-size=8g" in row["remedy"]


@pytest.mark.parametrize(("megabytes", "gpus", "verdict"), [(64, "0,1", FAIL), (64, "0", WARN), (2000, "0,1", OK)])
def test_what_size_of_shm_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int, gpus: str, verdict: str
) -> None:
    monkeypatch.setattr(machine, "disk", lambda _: {"total": megabytes << 20})
    found = patient(tmp_path, CUDA_VISIBLE_DEVICES=gpus)
    found.machine.shm.mkdir(parents=True, exist_ok=True)
    assert machine.shared_memory(found).verdict == verdict


def test_folders_that_can_not_be_written_and_a_disk_that_is_too_small(tmp_path: Path, hub: Hub) -> None:
    for name in ("ro", "hub"):
        (tmp_path / name).mkdir()
    there = shlex.quote(str(tmp_path))
    mounts = f"mount -t tmpfs -o size=1m,ro x {there}/ro; mount -t tmpfs -o size=1m x {there}/hub"
    environ = {"SUPERVISOR_VOLUME": f"{tmp_path}/ro", "SUPERVISOR_CACHE_DIR": f"{tmp_path}/ro/deep/cache"}
    found = mounted(tmp_path, hub, mounts, HF_HUB_CACHE=f"{tmp_path}/hub/not/yet", **environ)
    assert found["volume"]["verdict"] == WARN
    assert found["cache"]["verdict"] == WARN
    assert found["downloads"]["verdict"] == OK
    assert found["disk"]["verdict"] == FAIL
    assert re.search(r"org/tiny takes \d+ MB, and 1 MB are free", found["disk"]["found"])
    found = mounted(tmp_path, hub, mounts, HF_HOME=f"{tmp_path}/ro", TMPDIR=f"{tmp_path}/ro")
    assert found["downloads"]["verdict"] == found["temporary"]["verdict"] == FAIL


def test_few_files(doctor: Doctor) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        found = doctor()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found["files"]["verdict"] == WARN
    assert "--ulimit nofile" in found["files"]["remedy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "token", "check", "verdict", "said"),
    [
        ("org/tiny", "", "hub", OK, "answers, without a token"),
        ("org/tiny", "hf_wrong", "hub", FAIL, "refuses the token"),
        ("org/none", "", "model", FAIL, "status 401"),
        ("org/none", "hf_member", "model", FAIL, "status 404"),
        ("org/private", "hf_outsider", "model", FAIL, "status 404"),
        ("org/private", "hf_member", "model", OK, "may be downloaded"),
        ("org/gated", "", "model", FAIL, "Please log in"),
        ("org/gated", "hf_outsider", "model", FAIL, "not in its list"),
        ("org/gated", "hf_member", "model", OK, "may be downloaded"),
    ],
)
def test_the_hub(doctor: Doctor, name: str, token: str, check: str, verdict: str, said: str) -> None:
    row = doctor(name, HF_TOKEN=token)[check]
    assert (row["verdict"], said in row["found"]) == (verdict, True), row


@pytest.mark.parametrize(("model", "verdict"), [("org/tiny", FAIL), (str(DEMO), WARN)])
def test_a_hub_that_does_not_answer(doctor: Doctor, model: str, verdict: str) -> None:
    """A failure only where something has to come from there."""
    row = doctor(model, HF_ENDPOINT="http://127.0.0.1:9")["hub"]
    assert row["verdict"] == verdict
    assert "HF_ENDPOINT" in row["remedy"]


def test_a_hub_that_takes_the_question_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.doctor.hub.PATIENCE", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        found = patient(tmp_path, "org/tiny", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert {row.check for row in examine(found, CHECKS, 5) if "no answer within" in row.text} == set()
    row = model.hub(found)
    assert row.verdict == FAIL
    assert "timed out" in row.text


def test_nothing_is_asked_offline(doctor: Doctor, hub: Hub) -> None:
    before = http.get(f"{hub.url}/stand-in").json()["requests"]
    assert doctor(str(DEMO), HF_HUB_OFFLINE="1")["hub"]["verdict"] == OK
    assert http.get(f"{hub.url}/stand-in").json()["requests"] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "environ", "verdict", "said"),
    [
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, FAIL, "is not here, and HF_HUB_OFFLINE is set"),
        ("org/tiny", {}, OK, "are free in"),
        (str(DEMO), {}, OK, "the folder"),
        (str(DEMO / "model.safetensors"), {}, OK, "the folder"),
    ],
)
def test_where_the_weights_come_from(
    tmp_path: Path, hub: Hub, model: str, environ: dict[str, str], verdict: str, said: str
) -> None:
    found = {
        row.check: row for row in examine(patient(tmp_path, MODEL=model, HF_ENDPOINT=hub.url, **environ), CHECKS, 5)
    }
    assert [row for row in found.values() if "check itself failed" in row.text] == []
    assert (found["disk"].verdict, said in found["disk"].text) == (verdict, True), found["disk"]


def test_a_token_that_no_header_takes_is_not_shown(doctor: Doctor) -> None:
    row = doctor(HF_TOKEN="planted\x7f\u2603-token")["hub"]
    assert row["verdict"] == FAIL
    assert "planted" not in json.dumps(row)


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "verdict"), [(0, OK), (-100, WARN), (100, WARN), (-4000, FAIL), (4000, FAIL)])
def test_a_clock_that_is_wrong(doctor: Doctor, hub: Hub, ahead: int, verdict: str) -> None:
    http.post(f"{hub.url}/stand-in", json={"clock": ahead})
    try:
        assert doctor()["clock"]["verdict"] == verdict
    finally:
        http.post(f"{hub.url}/stand-in", json={"clock": 0})


# What is made up: no machine here has it


@pytest.mark.parametrize(
    ("files", "environ", "gpus", "cuda", "verdict", "said"),
    [
        ({".dockerenv": ""}, {}, None, "'12.8'", FAIL, "in this container"),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MODEL": "m"}, None, "'12.8'", FAIL, "in this container"),
        ({".dockerenv": ""}, {}, None, "None", OK, "built for the CPU"),
        ({}, {}, None, "'12.8'", OK, "none here"),
        ({}, {}, gpu(), "'12.8'", OK, "1 to be seen: NVIDIA X with 80.0 GB"),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, gpu(), "'12.8'", FAIL, "hides every GPU"),
        ({}, {"CUDA_VISIBLE_DEVICES": "-1"}, gpu(), "'12.8'", FAIL, "hides every GPU"),
        ({}, {"CUDA_VISIBLE_DEVICES": "0, 1"}, gpu(), "'12.8'", FAIL, "=0, 1 names GPU 1, which is not here"),
        ({}, {"CUDA_VISIBLE_DEVICES": "GPU-fc56dd54"}, gpu(), "'12.8'", OK, "1 to be seen: NVIDIA X"),
        ({}, {"CUDA_VISIBLE_DEVICES": "7"}, None, "'12.8'", OK, "1 to be seen"),  # no driver to ask
        ({}, {}, gpu() | {"gpus": [], "error": "GPU is lost"}, "'12.8'", FAIL, "GPU is lost"),
    ],
)
def test_gpus(
    tmp_path: Path, files: dict[str, str], environ: dict[str, str], gpus: object, cuda: str, verdict: str, said: str
) -> None:
    made(tmp_path, files)
    row = machine.gpus(patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path, cuda), gpus=gpus, **environ))
    assert (row.verdict, said in row.text) == (verdict, True), row
    assert "container" not in said or "--gpus all" in row.remedy


def test_only_the_gpus_that_vllm_sees_are_looked_at(tmp_path: Path) -> None:
    both = {"driver": "580.65.06", "gpus": [gpu(used=70)["gpus"][0], gpu(total=40)["gpus"][0] | {"name": "NVIDIA Y"}]}
    found = patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path, "'12.8'"), gpus=both, CUDA_VISIBLE_DEVICES="1")
    assert machine.gpus(found).text == "1 to be seen: NVIDIA Y with 40.0 GB"
    row = machine.gpu_memory(found)
    assert row is not None
    assert (row.verdict, row.text) == (OK, "0 MB of 40.0 GB are in use")


@pytest.mark.parametrize(("used", "share", "verdict"), [(70, "", WARN), (70, "0.1", OK), (1, "", OK)])
def test_a_gpu_that_others_use(tmp_path: Path, used: int, share: str, verdict: str) -> None:
    row = machine.gpu_memory(patient(tmp_path, gpus=gpu(used=used), GPU_MEMORY_UTILIZATION=share))
    assert row is not None
    assert row.verdict == verdict
    assert f"{used}.0 GB of 80.0 GB are in use" in row.text
    assert machine.gpu_memory(patient(tmp_path)) is None


@pytest.mark.parametrize(
    ("driver", "cuda", "verdict"),
    [
        ("580.65.06", "13.0", OK), ("580.65.05", "13.0", WARN), ("575.51.03", "13.0", FAIL), ("595.45.04", "13.2", OK),
        ("570.26", "12.8", OK), ("560.35.05", "12.8", WARN), ("525.60.13", "12.0", OK), ("525.60.12", "12.9", FAIL),
        ("535.129.03", "12.1", OK), ("470.82.01", "12.1", FAIL), ("450.80.02", "11.8", WARN),
        # No figure of its own: it is younger than the last release below it that has one.
        ("590.44.01", "13.9", WARN), ("610.43.02", "13.9", OK), ("560.28.03", "12.7", OK), ("555.42.06", "12.7", WARN),
        ("450.80.01", "11.8", FAIL), ("600.1", "99.0", OK), ("600.1", "10.2", OK),
    ],
)  # fmt: skip
def test_drivers(driver: str, cuda: str, verdict: str) -> None:
    assert machine.driver_for(driver, cuda).verdict == verdict


def test_nothing_is_claimed_of_a_cuda_that_is_in_no_table() -> None:
    assert "is not known here" in machine.driver_for("600.1", "99.0").text


def test_a_newer_cuda_came_with_a_newer_driver() -> None:
    releases = sorted(machine.DRIVERS, key=machine.numbers)
    assert [machine.DRIVERS[each] for each in releases] == sorted(machine.DRIVERS.values(), key=machine.numbers)
    assert all(machine.driver_for(driver, cuda).verdict == OK for cuda, driver in machine.DRIVERS.items())


# What a machine with an H200 said: NVML's readings (in its first form `used` has what is reserved, too), and the rest.
H200 = {"name": "NVIDIA H200", "used": 0, "total": 150_754_820_096, "reserved": 644_939_776}
H200_NVRM = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (nixbld@)  \n"
    "GCC version:  gcc version 15.3.0 (GCC) \n"
)


class Nvml:
    """NVIDIA's package, with those readings; in two versions."""

    NVMLError = OSError
    nvmlMemory_v2 = 0x02000028

    def __init__(self, used: int, *, second: bool) -> None:
        self.used, self.second = used, second

    def nvmlDeviceGetMemoryInfo(self, handle: int, **more: int) -> types.SimpleNamespace:
        assert handle == 0
        if more and not self.second:
            raise self.NVMLError("Function Not Found")
        reserved = int(str(H200["reserved"]))
        if more:
            return types.SimpleNamespace(total=H200["total"], used=self.used, reserved=reserved)
        return types.SimpleNamespace(total=H200["total"], used=self.used + reserved)

    def __getattr__(self, name: str) -> Callable[..., object]:
        told = {"nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": 0, "nvmlDeviceGetName": H200["name"],
                "nvmlSystemGetDriverVersion": "580.159.04", "nvmlInit": None, "nvmlShutdown": None}  # fmt: skip
        return lambda *_: told[name]


@pytest.mark.parametrize(
    ("used", "second", "said"),
    [(0, True, "0 MB of 150.8 GB"), (0, False, "645 MB of 150.8 GB"), (138_849_091_584, True, "138.8 GB of 150.8 GB")],
)
def test_a_gpus_memory_is_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int, second: bool, said: str
) -> None:
    monkeypatch.setattr("supervisor.around.gpus.DRIVERS", ("/dev/null",))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(used, second=second))
    found = dataclasses.replace(patient(tmp_path), ask_gpus=survey)
    assert machine.gpus(found).text == "1 to be seen: NVIDIA H200 with 150.8 GB"
    row = machine.gpu_memory(found)
    assert row is not None
    assert (row.verdict, said in row.text) == (WARN if used else OK, True), row


def test_an_h200s_driver(tmp_path: Path) -> None:
    """Its libcuda lies in a folder of its own, and an older one in CUDA's, which nothing leads to."""
    own = "usr/local/nvidia/lib64"
    made(tmp_path, {"proc/driver/nvidia/version": H200_NVRM, f"{own}/libcuda.so.580.159.04": "",
                    "usr/local/cuda-13.0/compat/libcuda.so.580.95.05": ""})  # fmt: skip
    (tmp_path / own / "libcuda.so.1").symlink_to("libcuda.so.580.159.04")
    program = a_vllm(tmp_path, "'13.0'")
    path = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64:/usr/local/nvidia/lib"}
    row = machine.driver(patient(tmp_path, SUPERVISOR_VLLM=program, gpus={"driver": "", "gpus": [H200]}, **path))
    assert row is not None
    assert (row.verdict, row.text) == (OK, "NVIDIA driver 580.159.04 is new enough for CUDA 13.0")


NVRM = "NVRM version: NVIDIA UNIX {}Kernel Module{} {}  Release Build  (dvs-builder@U22)\nGCC version: 12.3.0\n"


@pytest.mark.parametrize(("open_module", "for_what"), [("Open ", " for x86_64"), ("x86_64 ", "")])
def test_the_driver_is_read_without_its_library(tmp_path: Path, open_module: str, for_what: str) -> None:
    made(tmp_path, {"proc/driver/nvidia/version": NVRM.format(open_module, for_what, "535.104.05")})
    row = machine.driver(patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path, "'13.0'")))
    assert row is not None
    assert row.verdict == FAIL
    assert "535.104.05 is too old" in row.text
    told = machine.driver(patient(tmp_path / "none", SUPERVISOR_VLLM=a_vllm(tmp_path, "'13.0'"), gpus=gpu()))
    assert told is not None
    assert told.verdict == OK


DIRECT, BY_SHELL = "#!{python}\n", "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"


@pytest.mark.parametrize(
    ("where", "script"),
    [("pth", DIRECT), ("pth", BY_SHELL), ("PYTHONPATH", DIRECT), ("before", DIRECT), ("user", DIRECT), ("old", DIRECT)],
    ids=lambda value: {DIRECT: "direct", BY_SHELL: "by a shell"}.get(value, value),
)
def test_a_torch_that_lies_elsewhere(tmp_path: Path, where: str, script: str) -> None:
    own = tmp_path / ("vllm's own" if script == BY_SHELL else "own")
    program, site = an_environment(own, script, system=where == "user")
    environ = {}
    if where == "user":  # as any folder of the Python that the environment was made with
        elsewhere = tmp_path / ".local/lib" / site.parent.name / "site-packages"
    else:
        elsewhere = tmp_path / "else where/dist-packages"
    if where == "before":
        a_torch(site, "'12.1'")
    if where == "old":  # of a Python that was there once
        a_torch(own / "lib/python3.1/site-packages", "'12.1'")
    if where in ("PYTHONPATH", "before"):
        environ["PYTHONPATH"] = str(elsewhere)
    elif where != "user":
        (site / "more.pth").write_text(f"import sys; print('noise')\n{elsewhere}\n")
    a_torch(elsewhere, "'13.0'")
    found = patient(tmp_path, SUPERVISOR_VLLM=shlex.quote(program), gpus=gpu(), **environ)
    assert found.cuda == "13.0"
    row = machine.driver(found)
    assert row is not None
    assert (row.verdict, row.text) == (OK, "NVIDIA driver 580.65.06 is new enough for CUDA 13.0")
    assert list(tmp_path.rglob("imported")) == []


def test_a_torch_beside_vllm_is_found_without_asking_its_python(tmp_path: Path) -> None:
    program, site = an_environment(tmp_path, "#!/no/such/python\n")
    a_torch(site, "'12.8'")
    assert patient(tmp_path, SUPERVISOR_VLLM=program).cuda == "12.8"


@pytest.mark.parametrize("python", ["exit 0", "exit 1", "exec sleep 60", "echo /no/such/folder", "printf '\\377\\n'"])
def test_a_python_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.setattr("supervisor.doctor.patient.ASKING_PATIENCE", 0.5)
    program, _ = an_environment(tmp_path, "#!{python}3.x\n")
    made(tmp_path, {"bin/python3.x": f"#!/bin/sh\n{python}\n"})
    (tmp_path / "bin/python3.x").chmod(0o755)
    found = patient(tmp_path, SUPERVISOR_VLLM=program, gpus=gpu())
    before = time.monotonic()
    row = machine.driver(found)
    assert time.monotonic() - before < 5
    assert row is not None
    assert (row.verdict, "can't be told" in row.text) == (OK, True)


def loader_cache(*libraries: str, flags: int = 0x303) -> bytes:
    """What `ldconfig` writes, for libcuda.so.1 in these places."""
    texts, strings = 48 + 24 * len(libraries), b"libcuda.so.1\0"
    rows = b""
    for library in libraries:
        rows += struct.pack("=iIIIQ", flags, texts, texts + len(strings), 0, 0)
        strings += library.encode() + b"\0"
    return b"glibc-ld.so.cache1.1" + struct.pack("=II20x", len(libraries), len(strings)) + rows + strings


@pytest.mark.skipif(not Path("/sbin/ldconfig").exists(), reason="nothing to compare with")
def test_the_loaders_cache_is_read_as_its_own_program_does() -> None:
    done = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True)
    listed = re.findall(r"^\s*(\S+) \(libc6,[^)]*64[^)]*\) => (.+)$", done.stdout, re.MULTILINE)
    assert listed
    for name, _ in listed:
        first = next(path for each, path in listed if each == name)
        assert machine.cached(Path("/"), name) == Path(first)


def test_a_loaders_cache_in_both_formats(tmp_path: Path) -> None:
    made(tmp_path, {"etc/none": ""})
    (tmp_path / "etc/ld.so.cache").write_bytes(b"ld.so-1.7.0\0\0\0\0\0" + loader_cache("/a", "/b"))
    assert machine.cached(tmp_path, "libcuda.so.1") == Path("/a")


@pytest.mark.parametrize(
    "content", [b"", b"ld.so-1.7.0", loader_cache("/x")[:60], loader_cache("/x", flags=3)], ids=range(4)
)
def test_a_loaders_cache_that_does_not_tell(tmp_path: Path, content: bytes) -> None:
    assert machine.cached(tmp_path, "libcuda.so.1") is None
    made(tmp_path, {"etc/none": ""})
    (tmp_path / "etc/ld.so.cache").write_bytes(content)
    assert machine.cached(tmp_path, "libcuda.so.1") is None


COMPAT, OWN = "usr/local/cuda-13.0/compat", "usr/lib/x86_64-linux-gnu"
TOLD = {"VLLM_ENABLE_CUDA_COMPATIBILITY": "1"}


@pytest.mark.parametrize(
    ("driver", "compat", "environ", "cache", "name", "verdict", "said"),
    [
        # It is there, and nothing leads to it.
        ("535.104.05", "580.95.05", {}, (OWN,), "NVIDIA H100", FAIL, "driver 535.104.05 is too old"),
        ("535.104.05", "580.95.05", {}, (), "NVIDIA H100", FAIL, "driver 535.104.05 is too old"),
        # Each way to it.
        ("535.104.05", "580.95.05", TOLD, (OWN,), "NVIDIA H100", OK, "libcuda 580.95.05"),
        ("535.104.05", "580.95.05", {**TOLD, "VLLM_CUDA_COMPATIBILITY_PATH": f"/{COMPAT}"}, (), "", OK, "libcuda 580"),
        ("535.104.05", "580.95.05", {"LD_LIBRARY_PATH": f"/none::/{COMPAT}"}, (OWN,), "NVIDIA H100", OK, "libcuda 580"),
        ("535.104.05", "580.95.05", {}, (COMPAT, OWN), "NVIDIA H100", OK, f"(/{COMPAT}, over NVIDIA driver 5"),
        ("535.104.05", "580.95.05", {}, (OWN, COMPAT), "NVIDIA H100", FAIL, "driver 535.104.05 is too old"),
        ("535.104.05", "580.95.05", {"VLLM_ENABLE_CUDA_COMPATIBILITY": "0"}, (), "NVIDIA H100", FAIL, "too old"),
        ("535.104.05", "", TOLD, (), "NVIDIA H100", FAIL, "driver 535.104.05 is too old"),
        # It is of no use.
        ("470.82.01", "575.57.08", TOLD, (), "NVIDIA H100", FAIL, "libcuda 575.57.08"),
        ("535.104.05", "580.95.05", TOLD, (), "NVIDIA GeForce RTX 4090", FAIL, "error 804"),
        ("580.65.06", "580.95.05", TOLD, (), "NVIDIA GeForce RTX 4090", FAIL, "error 804"),
        ("535.104.05", "580.95.05", TOLD, (), "Quadro RTX 6000", WARN, "few"),
        ("610.43.02", "580.95.05", TOLD, (), "NVIDIA H100", WARN, "error 803"),
        # It is the driver's own.
        ("580.95.05", "580.95.05", TOLD, (), "NVIDIA GeForce RTX 4090", OK, "NVIDIA driver 580.95.05 is new enough"),
        ("581.95", "1.1", {}, (COMPAT,), "NVIDIA GeForce RTX 4090", OK, "NVIDIA driver 581.95 is new enough"),  # WSL
    ],
)  # fmt: skip
def test_a_library_that_stands_for_the_drivers_own(
    tmp_path: Path, driver: str, compat: str, environ: dict[str, str], cache: tuple[str, ...], name: str,
    verdict: str, said: str,
) -> None:  # fmt: skip
    for folder, version in ((COMPAT, compat), (OWN, driver)):
        if version:
            made(tmp_path, {f"{folder}/libcuda.so.{version}": ""})
            (tmp_path / folder / "libcuda.so.1").symlink_to(f"libcuda.so.{version}")
    made(tmp_path, {"proc/driver/nvidia/version": NVRM.format("Open ", " for x86_64", driver), "etc/none": ""})
    (tmp_path / "etc/ld.so.cache").write_bytes(loader_cache(*(f"/{each}/libcuda.so.1" for each in cache)))
    gpus = {"driver": driver, "gpus": [{"name": name, "used": 0, "total": GB}]}
    row = machine.driver(patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path, "'13.0'"), gpus=gpus, **environ))
    assert row is not None
    assert (row.verdict, said in row.text) == (verdict, True), row
    assert verdict == OK or row.remedy


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"sys/fs/cgroup/cgroup.controllers": "", "sys/fs/cgroup/memory.max": "1000000"}, 1_000_000),
        (
            {
                "sys/fs/cgroup/cgroup.controllers": "", "sys/fs/cgroup/a/memory.max": "1100000",
                "sys/fs/cgroup/a/b/memory.max": "max", "proc/self/cgroup": "0::/a/b\n",
            },
            1_100_000,
        ),
        (
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1200000", "proc/self/cgroup": "4:memory:/docker/x\n"},
            1_200_000,
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)  # fmt: skip
def test_the_containers_memory(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    made(tmp_path, {"proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 500000 kB\n", **files})
    found = patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path, "None"))
    assert found.machine.cgroup().get("limit") == limit
    row = machine.memory(found)
    assert row is not None
    assert row.verdict == (FAIL if limit else OK)  # the demo model's weights have more
    assert limit is None or "the container's limit" in row.text


def test_our_package_in_vllms_environment(tmp_path: Path) -> None:
    program = a_vllm(tmp_path, "None", "vllm_supervisor-0.1.0.dist-info/METADATA")
    assert machine.clash(patient(tmp_path, SUPERVISOR_VLLM=program)).verdict == FAIL
    assert machine.clash(patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path / "b", "None"))).verdict == OK
    made(tmp_path, {"site/supervisor-4.3.0.dist-info/METADATA": ""})
    assert machine.clash_among([str(tmp_path), str(tmp_path / "site")]).verdict == FAIL


def test_a_vllm_of_another_version(tmp_path: Path) -> None:
    program = a_vllm(tmp_path, "None")
    folder = tmp_path / "lib/python3.12/site-packages/vllm-0.32.0.dist-info"
    folder.rename(folder.with_name("vllm-0.31.9.dist-info"))
    found = patient(tmp_path, SUPERVISOR_VLLM=program)
    row = machine.engine(dataclasses.replace(found, settings=None))
    assert row is not None
    assert row.verdict == WARN
    missing = patient(tmp_path, SUPERVISOR_VLLM="/no/such/vllm")
    assert machine.engine(missing) is None  # for the settings tell
    assert "no such command" in missing.problems[0]


def test_too_few_gpus(tmp_path: Path) -> None:
    found = patient(tmp_path, TENSOR_PARALLEL_SIZE="4", CUDA_VISIBLE_DEVICES="0,1")
    (warning,) = [row for row in CHECKS["settings"](found) if row.verdict == WARN]  # type: ignore[union-attr]
    assert "only 2 GPUs are here" in warning.text


# Estimates

LLAMA = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
}  # fmt: skip
KINDS = ["sliding_attention"] * 5 + ["full_attention"]


@pytest.mark.parametrize(
    ("config", "kv_dtype", "tokens", "size"),
    [
        (LLAMA, "auto", 1, 2 * 32 * 8 * 128 * 2),  # 128 KiB a token, as is known of Llama 3 8B
        (LLAMA, "fp8", 1, 2 * 32 * 8 * 128),
        ({**LLAMA, "torch_dtype": "float32"}, "auto", 1, 2 * 32 * 8 * 128 * 2),
        ({**LLAMA, "head_dim": 64}, "auto", 10, 10 * 2 * 32 * 8 * 64 * 2),
        ({"text_config": LLAMA, "model_type": "vision"}, "auto", 1, 2 * 32 * 8 * 128 * 2),
        ({**LLAMA, "num_key_value_heads": None}, "auto", 1, 2 * 32 * 32 * 128 * 2),
        ({**LLAMA, "sliding_window": 100}, "auto", 1000, 100 * 2 * 32 * 8 * 128 * 2),
        ({**LLAMA, "sliding_window": 100, "use_sliding_window": False}, "auto", 1000, 1000 * 2 * 32 * 8 * 128 * 2),
        (
            {**LLAMA, "num_hidden_layers": 6, "sliding_window": 100, "layer_types": KINDS},
            "auto", 1000, (1000 + 5 * 100) * 2 * 8 * 128 * 2,
        ),
        ({**LLAMA, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, "auto", 1, 32 * 576 * 2),
        (
            {**LLAMA, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
            "auto", 10, 10 * 2 * 8 * 128 * 2,
        ),
    ],
)  # fmt: skip
def test_what_a_context_takes(config: dict[str, Any], kv_dtype: str, tokens: int, size: int) -> None:
    found = estimate.layout(config, kv_dtype)
    assert found is not None
    assert found.bytes(tokens) == size
    assert abs(found.tokens(found.bytes(5000)) - 5000) <= 1 or not found.whole
    assert found.tokens(-1) == 0


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 4}, {**LLAMA, "num_attention_heads": 0, "head_dim": 0}])
def test_a_config_that_does_not_say(config: dict[str, Any]) -> None:
    assert estimate.layout({**config, "num_key_value_heads": None}) is None


@pytest.mark.parametrize(
    ("total", "environ", "verdict", "said"),
    [
        (80, {}, OK, "tokens fit (an estimate)"),
        (80, {"MAX_MODEL_LEN": "1000000000"}, WARN, "a context of 1000000000 tokens will not fit"),
        (80, {"MAX_MODEL_LEN": "1000000000", "GPU_MEMORY_UTILIZATION": "0.01"}, WARN, "weights of"),
        (1, {}, WARN, "will hardly fit"),
    ],
)
def test_a_context_that_does_not_fit(
    tmp_path: Path, total: float, environ: dict[str, str], verdict: str, said: str
) -> None:
    row = model.context(patient(tmp_path, gpus=gpu(total), **environ))
    assert row is not None
    assert (row.verdict, said in row.text) == (verdict, True), row


# Two Llamas of 16 layers and 2048, as they were served by vLLM 0.24.0 on an H200 (on two, in the last one).
SMALL = {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
         "hidden_size": 2048, "dtype": "bfloat16"}  # fmt: skip
WIDE = {**SMALL, "num_key_value_heads": 32, "head_dim": 256}


@pytest.mark.parametrize(
    ("config", "weights", "utilization", "ranks", "said"),
    [
        (SMALL, 1_954_680_832, 0.92, 1, 4_128_672),  # "GPU KV cache size"
        (WIDE, 3_766_620_160, 0.92, 1, 253_248),  # "the estimated maximum model length"
        (WIDE, 3_766_620_160, 0.1, 1, 18_480),
        (SMALL, 1_954_680_832, 0.92, 2, 8_309_712),
    ],
)
def test_an_estimate_against_what_vllm_found(
    config: dict[str, Any], weights: int, utilization: float, ranks: int, said: int
) -> None:
    found = estimate.layout(config)
    assert found is not None
    memory = 150_754_820_096 - 644_939_776
    tokens = estimate.share(found, weights, memory, utilization, tensor=ranks).tokens
    assert abs(tokens / said - 1) < 0.01
    assert int(tokens * model.CAUTION) < said


@pytest.mark.parametrize(("kv_dtype", "told"), [("", "or KV_CACHE_DTYPE=fp8; or use"), ("fp8", "use more GPUs")])
def test_a_context_that_fits_is_advised_with_caution(tmp_path: Path, kv_dtype: str, told: str) -> None:
    asked = {"MAX_MODEL_LEN": "1000000000", "KV_CACHE_DTYPE": kv_dtype}
    row = model.context(patient(tmp_path, gpus={"driver": "", "gpus": [H200]}, **asked))
    assert row is not None
    fits, advised = (int(re.search(pattern, row.text + row.remedy)[1])  # type: ignore[index]
                     for pattern in (r"about (\d+) will", r"MAX_MODEL_LEN=(\d+)"))  # fmt: skip
    assert 0.97 * fits < advised < 0.985 * fits
    assert told in row.remedy
    assert row.remedy.count("fp8") == (kv_dtype == "")


@pytest.mark.parametrize(
    ("text", "tokens"), [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500), ("auto", 0), ("", 0)]
)
def test_lengths_as_vllm_reads_them(text: str, tokens: int) -> None:
    assert model.count(text) == tokens


def test_several_gpus_share_it() -> None:
    found = estimate.layout(LLAMA)
    assert found is not None
    one = estimate.share(found, 16 * GB, 80 * GB, 0.9)
    two = estimate.share(found, 16 * GB, 80 * GB, 0.9, tensor=2)
    assert one.fits
    assert 2 * one.tokens < two.tokens
    assert not estimate.share(found, 140 * GB, 80 * GB, 0.9).fits
    assert estimate.share(found, 140 * GB, 80 * GB, 0.9, tensor=4).fits


def test_the_context_of_a_model_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    found = patient(tmp_path, "org/tiny", gpus=gpu(), HF_ENDPOINT=hub.url)
    row = model.context(found)
    assert row is not None
    assert row.verdict == OK
    with contextlib.suppress(OSError):
        assert found.size == (DEMO / "model.safetensors").stat().st_size
