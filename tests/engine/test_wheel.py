"""The wheel alone: built as `uv build` and `python -m build` do, and run from an environment that has nothing else.

No index is asked: what the wheel needs is linked from our own environment, and no package more, so what an extra brings
is not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from supervisor import __version__
from tests.harness import FAKE, ROOT, Supervisor, clean_environment

pytestmark = pytest.mark.slow
# What only whoever trains the demo model needs.
LEFT_OUT = {"supervisor/demo/training.yaml"}


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert isinstance(done, subprocess.CompletedProcess)
    return done


def uv(*arguments: str | Path) -> None:
    found = run(sys.executable, ROOT / "scripts/find_uv.py")
    assert found.returncode == 0, found.stderr
    done = run("bash", "-c", f'{found.stdout}"$UV" "$@"', "uv", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By what publishes it. It comes of an sdist, so that what that lacks is missing here, too."""
    folder = tmp_path_factory.mktemp("wheel")
    done = run("bash", ROOT / "scripts/release", "dists", folder)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty") / "venv"
    done = run(sys.executable, "-m", "venv", "--without-pip", folder)
    assert done.returncode == 0, done.stderr
    into: list[str | Path] = ["--python", folder]
    uv("pip", "install", "--offline", "--no-deps", *into, wheel)
    (site,) = folder.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as packed:
        (metadata,) = [name for name in packed.namelist() if name.endswith(".dist-info/METADATA")]
        asked = [
            line.removeprefix("Requires-Dist: ")
            for line in packed.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist: ")
        ]
    link(asked, site)
    uv("pip", "check", *into)
    return folder


def link(asked: list[str], site: Path, seen: set[str] | None = None) -> None:
    """Puts these distributions, and those that they need, into `site`, as links to our own."""
    seen = set() if seen is None else seen
    for row in asked:
        requirement = Requirement(row)
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        found = distribution(name)
        for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                its = Path(str(found.locate_file(top))).resolve()
                if top.endswith(".dist-info"):  # uv takes no link for one
                    shutil.copytree(its, site / top)
                else:
                    (site / top).symlink_to(its)
        link(list(found.requires or ()), site, seen)


def supervisor(environment: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.defpath, "HOME": str(environment.parent), **more}
    return run(environment / "bin/vllm-supervisor", *arguments, cwd=environment.parent, env=environ)


def test_it_has_all_files_of_the_package(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "supervisor").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel) as packed:
        inside = set(packed.namelist())
    assert {name for name in inside if ".dist-info/" not in name} == files - LEFT_OUT
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)
    for suffix in (".json", ".toml", ".html", ".safetensors", "py.typed"):
        assert any(name.endswith(suffix) for name in inside), suffix


def test_it_says_which_it_is(environment: Path) -> None:
    for name in ("supervisor", "vllm-supervisor"):
        done = run(environment / "bin" / name, "--version", env={})
        assert (done.returncode, done.stdout, done.stderr) == (0, f"supervisor {__version__}\n", "")


def test_it_explains(environment: Path) -> None:
    done = supervisor(environment, "explain", "org/model", SUPERVISOR_VLLM=str(FAKE), PATH=clean_environment()["PATH"])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "serve" in done.stdout


def test_it_says_how_to_get_a_vllm(environment: Path) -> None:
    done = supervisor(environment, "up", "org/model", PATH=f"{environment}/bin")
    assert done.returncode == 2
    assert done.stderr.startswith("supervisor: vLLM was not found. Install it")


def test_it_says_which_extra_the_queue_needs(environment: Path) -> None:
    done = supervisor(
        environment, "up", "m", "--mode", "queue", SUPERVISOR_VLLM=str(FAKE), PATH=clean_environment()["PATH"]
    )
    assert done.returncode == 2
    assert done.stderr.endswith("install the extra, pip install 'vllm-supervisor[runpod]'\n")
    assert len(done.stderr.splitlines()) == 1


def test_it_serves(environment: Path, tmp_path: Path) -> None:
    program = environment / "bin/vllm-supervisor", "up"
    environ = {"PORT": "0", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}  # whose extra is not there, either
    with Supervisor("m", program=program, cwd=tmp_path, environ=environ) as running:
        answer = running.ready().client.post(
            "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"]
        assert running.client.get("/metrics").status_code == 200
        running.says(r"no traces: .* `pip install 'vllm-supervisor\[otel\]'` brings it")
        assert "<html" in running.client.get("/", headers={"Accept": "text/html"}).text
        running.process.terminate()
        assert running.process.wait(20) == 0
