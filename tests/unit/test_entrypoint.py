"""What the image's entrypoint runs, over a supervisor that says its arguments. tests/containers has the image."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Image:
    """The folder /opt/supervisor of the image; `programs` is first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        shutil.copy(ROOT / "entrypoint.sh", folder)
        self.write("bin/supervisor", 'echo "supervisor $*"; echo "HOME=$HOME"; echo "USER=$USER"')
        self.write("programs/vllm", 'echo "vllm $*"')

    def write(self, path: str, text: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
        return file

    def run(self, *arguments: object, **environ: object) -> list[str]:
        variables = {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": self.folder} | environ
        done = subprocess.run(
            ["sh", self.folder / "entrypoint.sh", *map(str, arguments)],
            env={name: str(value) for name, value in variables.items()}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.splitlines()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "supervisor up"),
        ("explain org/m", "supervisor explain org/m"),
        ("serve", "supervisor up"),
        ("--port 9000", "supervisor up --port 9000"),
        ("org/m", "supervisor up org/m"),
        ("vllm --version", "vllm --version"),
    ],
)
def test_what_is_run(image: Image, given: str, expected: str) -> None:
    assert image.run(*given.split())[0] == expected


@pytest.mark.parametrize("name", ["m.gguf", "m-Q4_K_M.GGUF", "model.safetensors"])
def test_a_models_file_is_served_though_it_may_be_run(image: Image, name: str) -> None:
    """Mounts of Windows and of many NAS show each file as executable."""
    file = image.write(name, "echo run")
    assert image.run(file, "--port", "9000")[0] == f"supervisor up {file} --port 9000"


def test_a_home_that_nobody_made_is_made(image: Image, tmp_path: Path) -> None:
    """The manifests name one on a volume, which is empty at first."""
    home = tmp_path / "cache/home"
    assert f"HOME={home}" in image.run(HOME=home)
    assert home.is_dir()


def test_a_home_that_can_not_be_made_is_below_the_temporary_folder(image: Image, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"HOME={tmp_path}/tmp/home" in image.run(HOME=tmp_path / "file/home", TMPDIR=tmp_path / "tmp")
    assert (tmp_path / "tmp/home").is_dir()


def test_where_that_one_is_taken_there_is_another(image: Image, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/home").touch()
    (line,) = (each for each in image.run(HOME="/proc/none", TMPDIR=tmp_path / "tmp") if each.startswith("HOME="))
    home = Path(line.removeprefix("HOME="))
    assert home.is_dir()
    assert home.parent == tmp_path / "tmp"


def test_a_user_without_a_name_has_a_number(image: Image) -> None:
    """As coreutils' id does for `--user 1234`: it writes the number, and fails."""
    image.write("programs/id", 'echo 1234; [ "$1" = -u ]')
    assert image.run()[2:] == ["USER=1234"]
    assert image.run(USER="somebody")[2:] == ["USER=somebody"]
