"""`supervisor doctor`: each thing that it finds, in a machine that has it; what can be real is real."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import venv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from supervisor.around.gpus import read_gpus as survey
from supervisor.around.machine import Machine
from supervisor.doctor import machine, model
from supervisor.doctor.examine import CHECKS, Check, examine, make_patient
from supervisor.doctor.hub import find_token
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


def patient(folder: Path, *arguments: str, gpus: dict[str, Any] | None = None, **environ: str) -> Patient:
    """Of a machine whose files are in `folder`."""
    given = Arguments(model=arguments[0] if arguments else None if "MODEL" in environ else str(DEMO))
    told = {"HOME": str(folder), "PATH": os.environ["PATH"], "PORT": "0", **environ}
    told.setdefault("SUPERVISOR_VLLM", a_vllm(folder / "its vllm", "'12.8'"))
    found = make_patient(given, told, Machine(folder), patience=60)
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


# What looks at the machine itself knows its GPUs, and says what is true of them.
without_a_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a GPU is here, and this says nothing of it")


@without_a_gpu
def test_a_machine_that_is_well(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor(SUPERVISOR_VLLM=a_vllm(tmp_path, "None"), HF_TOKEN="hf_member")
    assert {row["check"]: row for row in found.values() if row["verdict"] != OK} == {}
    assert "the token is member's" in found["hub"]["found"]
    assert found["model"]["found"] == "org/tiny may be downloaded"
    assert "takes" in found["disk"]["found"]
    assert set(found) >= {"settings", "vllm", "packages", "gpu", "shm", "memory", "port", "cache", "temporary"}


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

    def hangs(_: Patient) -> None:
        forever.wait()

    checks: dict[str, Check] = {"a": broken, "b": hangs, "c": lambda _: Row(OK, "fine"), "d": lambda _: None}
    found = examine(patient(tmp_path), checks, 0.2)
    forever.set()
    assert [(row.check, row.verdict) for row in found] == [("a", WARN), ("b", WARN), ("c", OK)]
    assert "ZeroDivisionError: ours" in found[0].text
    assert "no answer within" in found[1].text


def test_a_vllm_that_takes_long_to_be_asked(tmp_path: Path) -> None:
    made(tmp_path, {"vllm": "#!/bin/sh\nexec sleep 2\n"})
    (tmp_path / "vllm").chmod(0o755)
    given, environ = Arguments(model=str(DEMO)), {"HOME": str(tmp_path), "SUPERVISOR_VLLM": str(tmp_path / "vllm")}
    (problem,) = make_patient(given, environ, Machine(tmp_path), patience=0.2).problems
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


@without_a_gpu
def test_a_small_shm(tmp_path: Path, hub: Hub) -> None:
    row = mounted(tmp_path, hub, "mount -t tmpfs -o size=64m x /dev/shm", CUDA_VISIBLE_DEVICES="0,1")["shm"]
    assert row["verdict"] == FAIL
    assert "64 MiB" in row["found"]
    assert "--shm-size=8g" in row["remedy"]


@pytest.mark.parametrize(
    ("total", "environ", "verdict", "said"),
    [
        (80, {}, OK, "2 MB of weights for a GPU of which vLLM may use 73.6 GB"),
        (80, {"TENSOR_PARALLEL_SIZE": "2", "GPU_MEMORY_UTILIZATION": "0.5"}, OK, "1 MB of weights for a GPU"),
        (0.001, {}, FAIL, "may use 1 MB"),
        (0, {}, None, ""),
    ],
)
def test_weights_that_do_not_fit(
    tmp_path: Path, total: float, environ: dict[str, str], verdict: str | None, said: str
) -> None:
    row = model.check_weights(patient(tmp_path, gpus=gpu(total) if total else None, **environ))
    assert (row.verdict if row else None, said in (row.text if row else "")) == (verdict, True), row
    assert verdict != FAIL or (row is not None and "TENSOR_PARALLEL_SIZE" in row.remedy)


@pytest.mark.parametrize(("megabytes", "gpus", "verdict"), [(64, "0,1", FAIL), (64, "0", WARN), (2000, "0,1", OK)])
def test_what_size_of_shm_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int, gpus: str, verdict: str
) -> None:
    monkeypatch.setattr(machine, "disk", lambda _: {"total": megabytes << 20})
    found = patient(tmp_path, CUDA_VISIBLE_DEVICES=gpus)
    found.machine.shm.mkdir(parents=True, exist_ok=True)
    assert machine.check_shared_memory(found).verdict == verdict


def test_the_folder_for_downloads_may_lie_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {"SUPERVISOR_VLLM": str(FAKE), "DOWNLOAD_DIR": "~/models"}
    assert make_patient(Arguments(model="org/tiny"), environ).download_path == tmp_path / "models"


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
    with tempfile.TemporaryDirectory() as short:  # a longer name is no place for sockets
        mounts += f"; mount -t tmpfs -o size=1m,ro x {short}"
        found = mounted(tmp_path, hub, mounts, HF_HOME=f"{tmp_path}/ro", TMPDIR=short)
    assert found["downloads"]["verdict"] == found["temporary"]["verdict"] == FAIL


def test_a_temporary_folder_from_which_no_code_can_be_loaded(tmp_path: Path, hub: Hub) -> None:
    """Docker mounts a tmpfs so, where nobody says `exec`. Weights and archives need no more."""
    with tempfile.TemporaryDirectory() as there:  # a longer name is no place for sockets
        mount = f"mount -t tmpfs -o noexec x {there}"
        found = mounted(tmp_path, hub, mount, TMPDIR=there, HF_HOME=there, SUPERVISOR_CACHE_DIR=there)
    assert found["downloads"]["verdict"] == found["cache"]["verdict"] == OK
    assert found["temporary"]["verdict"] == FAIL
    assert "noexec" in found["temporary"]["found"]
    assert "--tmpfs /tmp:exec" in found["temporary"]["remedy"]


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
    row = model.check_hub(found)
    assert row.verdict == FAIL
    assert "timed out" in row.text


@pytest.mark.parametrize(
    ("hub", "transformers", "expected"),
    [("1", "", True), ("", "1", True), ("0", "1", False), ("", "0", False), ("1", "0", True), ("yes", "", True)],
)
def test_what_is_offline_to_the_hubs_client(hub: str, transformers: str, expected: bool) -> None:
    environ = {"HF_HUB_OFFLINE": hub, "TRANSFORMERS_OFFLINE": transformers, "SUPERVISOR_VLLM": str(FAKE)}
    assert make_patient(Arguments(model="org/tiny"), environ).is_offline is expected


def test_what_is_around_a_variable_is_read_as_the_start_reads_it(doctor: Doctor, hub: Hub) -> None:
    assert doctor("org/tiny", HF_ENDPOINT=f"{hub.url}\n")["hub"]["verdict"] == OK


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
        row.check: row
        for row in examine(patient(tmp_path, gpus=None, MODEL=model, HF_ENDPOINT=hub.url, **environ), CHECKS, 5)
    }
    assert [row for row in found.values() if "check itself failed" in row.text] == []
    assert (found["disk"].verdict, said in found["disk"].text) == (verdict, True), found["disk"]


def test_a_token_that_never_comes_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.doctor.hub.PATIENCE", 0.1)
    os.mkfifo(tmp_path / "token")
    assert find_token({"HF_TOKEN_PATH": str(tmp_path / "token")}) == ""


def test_a_token_that_no_header_takes_is_not_shown(doctor: Doctor) -> None:
    row = doctor(HF_TOKEN="planted\x7f\u2603-token")["hub"]
    assert row["verdict"] == FAIL
    assert "planted" not in json.dumps(row)


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
    tmp_path: Path,
    files: dict[str, str],
    environ: dict[str, str],
    gpus: dict[str, Any] | None,
    cuda: str,
    verdict: str,
    said: str,
) -> None:
    made(tmp_path, files)
    row = machine.check_gpus(patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path, cuda), gpus=gpus, **environ))
    assert (row.verdict, said in row.text) == (verdict, True), row
    assert "container" not in said or "--gpus all" in row.remedy


def test_only_the_gpus_that_vllm_sees_are_looked_at(tmp_path: Path) -> None:
    both = {"driver": "580.65.06", "gpus": [gpu(used=70)["gpus"][0], gpu(total=40)["gpus"][0] | {"name": "NVIDIA Y"}]}
    found = patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path, "'12.8'"), gpus=both, CUDA_VISIBLE_DEVICES="1")
    assert machine.check_gpus(found).text == "1 to be seen: NVIDIA Y with 40.0 GB"
    row = machine.check_gpu_memory(found)
    assert row is not None
    assert (row.verdict, row.text) == (OK, "0 MB of 40.0 GB are in use")


@pytest.mark.parametrize(("used", "share", "verdict"), [(70, "", WARN), (70, "0.1", OK), (1, "", OK)])
def test_a_gpu_that_others_use(tmp_path: Path, used: int, share: str, verdict: str) -> None:
    row = machine.check_gpu_memory(patient(tmp_path, gpus=gpu(used=used), GPU_MEMORY_UTILIZATION=share))
    assert row is not None
    assert row.verdict == verdict
    assert f"{used}.0 GB of 80.0 GB are in use" in row.text
    assert machine.check_gpu_memory(patient(tmp_path)) is None


@pytest.mark.parametrize(
    ("takes", "cuda", "environ", "verdict", "said"),
    [
        ("13.0", "13.0", {}, OK, "takes CUDA up to 13.0"),
        ("13.2", "13.0", {}, OK, "takes CUDA up to 13.2"),
        ("13.10", "13.9", {}, OK, "takes CUDA up to 13.10"),
        ("13.0", "12.8", {}, OK, "vLLM's torch is built for 12.8"),
        ("12.6", "12.8", {}, WARN, "PTX are refused"),
        ("12.8", "13.0", {}, FAIL, "takes CUDA up to 12.8, and vLLM's torch is built for 13.0"),
        ("12.8", "13.0", {"VLLM_ENABLE_CUDA_COMPATIBILITY": "1"}, WARN, "takes CUDA up to 12.8"),
        ("12.8", "13.0", {"VLLM_ENABLE_CUDA_COMPATIBILITY": "0"}, FAIL, "takes CUDA up to 12.8"),
        ("", "13.0", {}, OK, "it takes can't be told"),
        ("13.0", "", {}, WARN, "built for the CPU"),
    ],
)
def test_drivers(tmp_path: Path, takes: str, cuda: str, environ: dict[str, str], verdict: str, said: str) -> None:
    program = a_vllm(tmp_path, f"'{cuda}'" if cuda else "None")
    found = patient(tmp_path, SUPERVISOR_VLLM=program, gpus=gpu() | {"cuda": takes}, **environ)
    row = machine.check_driver(found)
    assert row is not None
    assert (row.verdict, said in row.text) == (verdict, True), row
    assert verdict == OK or row.remedy


# What a machine with an H200 said: NVML's readings (in its first form `used` has what is reserved, too), and the rest.
H200 = {"name": "NVIDIA H200", "used": 0, "total": 150_754_820_096, "reserved": 644_939_776}


class Nvml:
    """NVIDIA's package, with those readings; in two versions."""

    NVMLError = OSError
    nvmlMemory_v2 = 0x02000028

    def __init__(self, used: int, *, second: bool, cuda: int | None = None) -> None:
        self.used, self.second, self.cuda = used, second, cuda

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        if self.cuda is None:
            raise self.NVMLError("Library Not Found")
        return self.cuda

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
    monkeypatch.setattr("supervisor.around.gpus.DRIVER_DEVICES", ("/dev/null",))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(used, second=second))
    found = dataclasses.replace(patient(tmp_path), ask_gpus=survey)
    assert machine.check_gpus(found).text == "1 to be seen: NVIDIA H200 with 150.8 GB"
    row = machine.check_gpu_memory(found)
    assert row is not None
    assert (row.verdict, said in row.text) == (WARN if used else OK, True), row


@pytest.mark.parametrize(("told", "cuda"), [(13010, "13.1"), (12080, "12.8"), (None, "")])
def test_the_cuda_that_a_driver_takes(monkeypatch: pytest.MonkeyPatch, told: int | None, cuda: str) -> None:
    monkeypatch.setattr("supervisor.around.gpus.DRIVER_DEVICES", ("/dev/null",))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(0, second=True, cuda=told))
    assert survey() == {"driver": "580.159.04", "cuda": cuda, "gpus": [H200]}


NVRM = "NVRM version: NVIDIA UNIX {}Kernel Module{} {}  Release Build  (dvs-builder@U22)\nGCC version: 12.3.0\n"


@pytest.mark.parametrize(("open_module", "for_what"), [("Open ", " for x86_64"), ("x86_64 ", "")])
def test_the_driver_is_read_without_its_library(tmp_path: Path, open_module: str, for_what: str) -> None:
    made(tmp_path, {"proc/driver/nvidia/version": NVRM.format(open_module, for_what, "535.104.05")})
    row = machine.check_driver(patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path, "'13.0'")))
    assert row is not None
    assert row.text == "NVIDIA driver 535.104.05; which CUDA it takes can't be told"
    told = machine.check_driver(patient(tmp_path / "none", SUPERVISOR_VLLM=a_vllm(tmp_path, "'13.0'"), gpus=gpu()))
    assert told is not None
    assert "580.65.06" in told.text


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
    assert found.torch_cuda == "13.0"
    row = machine.check_driver(found)
    assert row is not None
    assert "580.65.06" in row.text
    assert list(tmp_path.rglob("imported")) == []


def test_a_torch_beside_vllm_is_found_without_asking_its_python(tmp_path: Path) -> None:
    program, site = an_environment(tmp_path, "#!/no/such/python\n")
    a_torch(site, "'12.8'")
    assert patient(tmp_path, SUPERVISOR_VLLM=program).torch_cuda == "12.8"


def test_what_starts_vllm_and_is_no_python_is_not_asked(tmp_path: Path) -> None:
    """A shell would take the question for its own commands, `import` among them."""
    program, site = an_environment(tmp_path)
    shell = f"#!/bin/sh\ncase $* in *-c*) touch {tmp_path}/asked ;; esac\necho 0.32.0\n"
    made(tmp_path, {"bin/shell": shell})
    (tmp_path / "bin/shell").chmod(0o755)
    (tmp_path / "bin/vllm").write_text(f"#!{tmp_path}/bin/shell\n")
    a_torch(site, "'12.8'")
    found = patient(tmp_path, SUPERVISOR_VLLM=program)
    assert found.torch_cuda == "12.8"
    assert found.vllm.python is None
    assert patient(tmp_path, SUPERVISOR_VLLM=f"nice {program}").vllm.python is None
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("python", ["exit 0", "exit 1", "exec sleep 60", "echo /no/such/folder", "printf '\\377\\n'"])
def test_a_python_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.setattr("supervisor.doctor.patient.PYTHON_PATIENCE", 0.5)
    program, _ = an_environment(tmp_path, "#!{python}3.x\n")
    made(tmp_path, {"bin/python3.x": f"#!/bin/sh\n{python}\n"})
    (tmp_path / "bin/python3.x").chmod(0o755)
    found = patient(tmp_path, SUPERVISOR_VLLM=program, gpus=gpu())
    before = time.monotonic()
    row = machine.check_driver(found)
    assert time.monotonic() - before < 5
    assert row is not None
    assert (row.verdict, "can't be told" in row.text) == (OK, True)


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
    row = machine.check_memory(found)
    assert row is not None
    assert row.verdict == (FAIL if limit else OK)  # the demo model's weights have more
    assert limit is None or "the container's limit" in row.text


def test_our_package_in_vllms_environment(tmp_path: Path) -> None:
    program = a_vllm(tmp_path, "None", "vllm_supervisor-0.1.0.dist-info/METADATA")
    assert machine.check_packages(patient(tmp_path, SUPERVISOR_VLLM=program)).verdict == FAIL
    assert machine.check_packages(patient(tmp_path, SUPERVISOR_VLLM=a_vllm(tmp_path / "b", "None"))).verdict == OK
    made(tmp_path, {"site/supervisor-4.3.0.dist-info/METADATA": ""})
    assert machine.find_clash([str(tmp_path), str(tmp_path / "site")]).verdict == FAIL


def test_a_vllm_of_another_version(tmp_path: Path) -> None:
    program = a_vllm(tmp_path, "None")
    folder = tmp_path / "lib/python3.12/site-packages/vllm-0.32.0.dist-info"
    folder.rename(folder.with_name("vllm-0.31.9.dist-info"))
    found = patient(tmp_path, SUPERVISOR_VLLM=program)
    row = machine.check_vllm(dataclasses.replace(found, settings=None))
    assert row is not None
    assert row.verdict == WARN
    missing = patient(tmp_path, SUPERVISOR_VLLM="/no/such/vllm")
    assert machine.check_vllm(missing) is None  # for the settings tell
    assert "no such command" in missing.problems[0]


def test_too_few_gpus(tmp_path: Path) -> None:
    found = patient(tmp_path, TENSOR_PARALLEL_SIZE="4", CUDA_VISIBLE_DEVICES="0,1")
    judged: Any = CHECKS["settings"](found)
    (warning,) = [row for row in judged if row.verdict == WARN]
    assert "only 2 GPUs are here" in warning.text
