"""Writes the post-mortem of a failed engine: a JSON file in the cache folder, and a block in the log for an issue.

It is written in a thread of its own, so that the next engine is not held up; whatever goes wrong with it, a full disk
or a driver that hangs, costs one line of the log and nothing else. Everything in it went through the mask.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from supervisor.around.account import Account
from supervisor.around.gpus import read_gpus
from supervisor.around.machine import Machine, amount, disk, versions
from supervisor.bounded import run_bounded, try_bounded
from supervisor.engine import tracebacks
from supervisor.engine.run import Observer, Run
from supervisor.secrets import Mask

FOLDER = "postmortem"
MAX_BUNDLES = 5
GPU_PATIENCE = 5.0  # a driver that hangs answers nobody, and the thread that asked it stays; we do not
PATIENCE = 12.0  # the whole may take so many seconds, where the supervisor's own end waits for it
MAX_COMMAND_LENGTH, MAX_LINE_LENGTH = 400, 200
# `/status` tells these too; but the bundle has them at length, or they are the next run's.
OMITTED_KEYS = ("last_failure", "log_tail", "progress", "pid")


class PostMortem(Observer):
    """`facts` is what `/status` tells and never changes, with the settings; `account` is what it says of the engine."""

    def __init__(
        self,
        cache: Path,
        *,
        mask: Mask,
        vllm_version: str,
        facts: Mapping[str, Any],
        account: Account,
        machine: Machine | None = None,
    ) -> None:
        self.folder = cache / FOLDER
        self.mask = mask
        self.vllm_version = vllm_version
        self.facts = facts
        self.account = account
        self.machine = machine or Machine()
        self.log = logging.getLogger("supervisor.postmortem")

    async def run_failed(self, run: Run, verdict: str, given_up: bool) -> None:
        """Writes and logs it. Raises nothing, and ends in bounded time."""
        failure = {
            **self.account.status(),
            **(self.account.last_failure or {}),
            "timeline": list(self.account.timeline),
            "argv": run.child.command.argv if run.child is not None else (),
            "log": run.log,
            "verdict": verdict,
            "given_up": given_up,
        }
        try:
            self.log.error("%s", await run_bounded(PATIENCE, lambda: self.report(failure)))
        except TimeoutError:
            self.log.warning("the post-mortem was not done in %g s", PATIENCE)
        except Exception:  # it tells of a failure, and must not become one
            self.log.exception("the post-mortem could not be written")

    def report(self, failure: Mapping[str, Any]) -> str:
        """Gathers the bundle, writes it, and returns the block for the log."""
        bundle = self.gather(failure)
        try:
            location = str(self.write(bundle))
        except OSError as error:
            location = f"could not be written to {self.folder} ({error.strerror or error})"
        return "\n".join(format_block(bundle, location))

    def gather(self, failure: Mapping[str, Any]) -> dict[str, Any]:
        facts = dict(self.facts)
        failure = {name: value for name, value in failure.items() if name not in OMITTED_KEYS}
        bundle = {
            "written": time.time(),
            # It is not masked word for word: that a value is a secret may be told by the option before it.
            "command": self.mask(self.mask.command(failure.pop("argv"))),
            **failure,
            "settings": facts.pop("settings", []),
            "facts": facts,
            "versions": versions(self.vllm_version),
            "memory": self.machine.memory(),
            "cgroup": self.machine.cgroup(),
            "disks": [disk(folder) for folder in (self.folder, Path("/tmp"), self.machine.shm)],  # noqa: S108
            "gpu": try_bounded(GPU_PATIENCE, read_gpus),
            "nvidia_smi": _run_nvidia_smi(),
        }
        masked: dict[str, Any] = _mask_value(bundle, self.mask)
        return masked

    def write(self, bundle: Mapping[str, Any]) -> Path:
        """Raises OSError, and then removes what is written in part. Of whole bundles only the last few stay."""
        written_at = float(bundle["written"])
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(written_at)) + f"-{int(written_at % 1 * 1000):03}"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{stamp}-{os.getpid()}.json"
        part = path.with_suffix(".part")
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(bundle, file, indent=1)
            part.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        for old in sorted(self.folder.glob("*.json"))[:-MAX_BUNDLES]:
            with contextlib.suppress(OSError):  # another supervisor on the same volume was quicker
                old.unlink()
        return path


def format_block(bundle: Mapping[str, Any], location: str) -> list[str]:
    """Returns the lines that have what an issue needs of the bundle at first sight."""
    from supervisor.engine.diagnosis import is_effect  # noqa: PLC0415  # 200 patterns to compile, for failures only

    signal, code = bundle.get("signal"), bundle.get("exit_code")
    ending = f"signal {signal}" if signal is not None else f"exit code {code}" if code is not None else "ended by us"
    memory, cgroup = bundle["memory"], bundle["cgroup"]
    memory_notes = [f"{amount(memory['available'])} of {amount(memory['total'])} free"] if "available" in memory else []
    memory_notes += [f"limit {amount(cgroup['limit'])}"] if "limit" in cgroup else []
    memory_notes += [f"{cgroup['oom_kills']} killed for want of it"] if cgroup.get("oom_kills") else []
    software = bundle["versions"]
    lines = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(float(bundle.get("at") or bundle["written"]))),
        "what": f"{bundle.get('cause')} ({ending})",
        "remedy": bundle.get("remedy"),
        "then": (f"given up: {bundle.get('verdict')}" if bundle.get("given_up") else "started again")
        + f"; restarts before: {bundle.get('restarts')}",
        "states": _format_timeline(bundle.get("timeline") or ()),
        "start": ", ".join(f"{row['name']} {row['seconds']:.1f} s" for row in bundle.get("phases") or ()),
        "versions": f"supervisor {software['supervisor']}, vLLM {software['vllm']}, Python {software['python']}, "
        f"{software['kernel']}",
        "memory": ", ".join(memory_notes),
        "disks": ", ".join(f"{space['folder']} {amount(space['free'])} free" for space in bundle["disks"]
                           if "free" in space),
        "gpu": _format_gpus(bundle["gpu"]),
        "settings": _cut(" ".join(f"{row['name']}={shlex.quote(row['value'])}" for row in bundle["settings"]
                                  if not row["source"].startswith("default")), MAX_COMMAND_LENGTH),
        "command": _cut(bundle["command"], MAX_COMMAND_LENGTH),
        "last error": _cut(tracebacks.read(bundle.get("log") or (), is_effect).error or "", MAX_LINE_LENGTH),
        "bundle": location,
    }  # fmt: skip
    rows = [f"  {name + ':':<12}{str(text).splitlines()[0]}" for name, text in lines.items() if text]
    return ["post-mortem, to be pasted into an issue:", *rows]


def _run_nvidia_smi() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        result = subprocess.run([program], capture_output=True, errors="replace", timeout=GPU_PATIENCE, check=False)
        return result.stdout or result.stderr
    return "it did not answer"


def _mask_value(value: Any, mask: Mask) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {str(key): _mask_value(item, mask) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_mask_value(item, mask) for item in value]
    return value


def _format_timeline(timeline: Iterable[Mapping[str, Any]]) -> str:
    """Returns the last states, with the seconds since the one before: `starting, ready +1.2 s, restarting +33.0 s`."""
    rows = list(timeline)[-8:]
    steps = [f"{row['state']} +{row['at'] - previous['at']:.1f} s" for previous, row in itertools.pairwise(rows)]
    return ", ".join([str(rows[0]["state"]), *steps]) if rows else ""


def _format_gpus(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "none to be seen"
    gpu_notes = [f"{gpu['name']} {amount(gpu['used'])} of {amount(gpu['total'])} in use" for gpu in report["gpus"]]
    return "; ".join([*gpu_notes, f"driver {report['driver']}" if report["driver"] else str(report.get("error", ""))])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " ..."
