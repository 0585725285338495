"""Keeps what vLLM compiles (torch.compile, Triton, FlashInfer, CUDA's own) from one container to the next.

vLLM writes into a folder of this container, always under the same name, since compiled code names its own files. When
it is ready, that folder goes to the volume as one archive, by a rename; the next start unpacks it while vLLM imports.
So workers that share a volume never see half of what another one writes, a network volume carries one large file
instead of thousands of small ones, and a full or read-only volume costs the next start its time and nothing else. The
archive's name has vLLM's version, the GPU and the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor.bounded import Call
from supervisor.engine.lifecycle import State
from supervisor.engine.run import Change, Observer, Run

if TYPE_CHECKING:
    from supervisor.around.startup_plan import StartupPlan
    from supervisor.engine.diagnosis import Diagnosis

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
# Each variable gets a folder below ours. One that the user set stays. vLLM keeps Inductor's folder below its own.
FOLDERS = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",  # it is for what is compiled beside the model; for that vLLM has its own
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}
# A larger archive takes longer to carry than its files to compile; it is rather a cache of something else.
MAX_ARCHIVE_BYTES = 4 * 1024**3
# These are locks, what is still being written, and what is another machine's: which GPUs reach which.
EXCLUDED_NAMES = re.compile(r"\.(lock|tmp)$|(^|/)tmp\.pid_|gpu_p2p_access_cache")
MAX_HALF_AGE_S = 3600.0  # half-written archives of workers that died are removed after so many seconds


def hardware_id() -> str:
    """Returns what compiled code is for: the GPUs' name, or this processor with what it can do."""
    with contextlib.suppress(OSError):
        names = {
            match[1].strip()
            for path in NVIDIA_GPUS.glob("*/information")
            if (match := re.search(r"Model:(.*)", path.read_text()))
        }
        if names:
            return "+".join(sorted(names))
    flags = ""
    with contextlib.suppress(OSError):
        match = re.search(r"(?m)^(flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text())
        flags = " ".join(sorted(match[2].split())) if match else ""
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"


class Caches:
    """vLLM gets `environment`; `restore` is for while it imports, `keep` for when it is ready. All may be left out."""

    def __init__(self, base: Path, store: Path, *, version: str, model: str) -> None:
        """`base` is a folder for temporary files, `store` is on the volume. Raises OSError where `base` is not safe."""
        identity = f"{version}-{hardware_id()}-{model}"
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", identity).strip("-")[:180]
        if len(identity) > len(name):  # what was cut off, or is in no Latin letters, tells models apart, too
            name += f"-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        own_folder = base / f"vllm-supervisor-{os.getuid()}"
        own_folder.mkdir(mode=0o700, exist_ok=True)
        info = own_folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
            raise PermissionError(f"{own_folder} is somebody else's")  # the code that lies there is run
        self.folder = own_folder / name
        self.archive = store / f"{name}.tar"
        self.archived_files: set[str] = set()
        self.lock = threading.Lock()

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {name: str(self.folder / part) for name, part in FOLDERS.items() if not environ.get(name)}

    def restore(self) -> str:
        """Unpacks what another start left, and returns what happened, in words."""
        with self.lock:
            if self.folder.is_dir():
                # This start is to put it onto the volume, where the earlier one could not, or did not come so far.
                self.archived_files = self._list_files() if self.archive.exists() else set()
                return f"compiled code of an earlier start is here: {self.folder}"
            started_at = time.monotonic()
            half = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.half")
            shutil.rmtree(half, ignore_errors=True)
            try:
                size = self.archive.stat().st_size
                if not hasattr(tarfile, "data_filter"):  # without it, an archive may write anywhere
                    raise OSError("that takes Python 3.11.4 or later")
                with tarfile.open(self.archive, "r:") as archive:
                    archive.extractall(half, filter="data")
            except FileNotFoundError:
                return "no compiled code is kept for this vLLM, GPU and model yet"
            except OSError as error:  # the disk here may be full; the archive is none the worse
                shutil.rmtree(half, ignore_errors=True)
                return f"compiled code that was kept can't be unpacked ({error.strerror or error}): it is made anew"
            except (tarfile.TarError, ValueError) as error:
                shutil.rmtree(half, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self.archive.unlink()
                return f"compiled code that was kept is damaged ({error}): it is deleted, and made anew"
            try:
                half.rename(self.folder)
            except OSError:  # vLLM was quicker, and has begun its own
                shutil.rmtree(half, ignore_errors=True)
                return "compiled code that was kept came too late"
            self.archived_files = self._list_files()
            return f"compiled code of an earlier start: {size / 1e6:.0f} MB in {time.monotonic() - started_at:.1f} s"

    def keep(self) -> str | None:
        """Puts what is there now onto the volume, if that is more than before. Returns what happened, in words."""
        with self.lock:
            files = self._list_files()
            if not files - self.archived_files:
                return None
            store, half = self.archive.parent, ""
            try:
                size = sum((self.folder / name).stat().st_size for name in files)
                if size > MAX_ARCHIVE_BYTES:
                    return f"compiled code is not kept: {size / 1e9:.1f} GB are too many"
                store.mkdir(parents=True, exist_ok=True)
                self._sweep_halves()
                descriptor, half = tempfile.mkstemp(".half", ".", store)
                with open(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:") as archive:  # noqa: PTH123
                    with contextlib.suppress(OSError):  # a bucket that is mounted may know no modes
                        os.fchmod(descriptor, 0o644)
                    archive.add(self.folder, ".", filter=_sanitize)
                Path(half).replace(self.archive)
            except (OSError, tarfile.TarError) as error:  # among them a file that went or shrank while it was read
                with contextlib.suppress(OSError):
                    Path(half).unlink()
                return f"compiled code can't be kept at {store} ({getattr(error, 'strerror', None) or error})"
            self.archived_files = files
            return f"compiled code kept for the next start: {size / 1e6:.0f} MB, {self.archive}"

    def _list_files(self) -> set[str]:
        """Returns the files that are worth keeping. They may come and go meanwhile."""
        names = set()
        for folder, _, file_names in os.walk(self.folder):
            paths = (os.path.join(folder, name) for name in file_names)  # noqa: PTH118
            names |= {os.path.relpath(path, self.folder) for path in paths if not os.path.islink(path)}  # noqa: PTH114
        return {name for name in names if not EXCLUDED_NAMES.search(name)}

    def _sweep_halves(self) -> None:
        for path in self.archive.parent.glob(".*.half"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > MAX_HALF_AGE_S:
                    path.unlink()


class CacheKeeper(Observer):
    """Unpacks while the first engine imports, and packs whenever one is ready. Nobody waits for either."""

    def __init__(self, caches: Caches | None, plan: StartupPlan | None) -> None:
        self.caches = caches
        self.plan = plan
        self.log = logging.getLogger("supervisor.caches")
        self.has_restored = self.has_forgotten = False
        self.keep_call: Call[None] | None = None

    def run_began(self, run: Run) -> None:
        Call(lambda: self._run_job(lambda: self._restore(run)))

    def state_changed(self, change: Change) -> None:
        if change.state is State.READY:
            self.has_forgotten = False
            if self.keep_call is None or not self.keep_call.is_running:
                self.keep_call = Call(lambda: self._run_job(self._keep))

    def run_judged(self, run: Run, diagnosis: Diagnosis) -> None:
        # Once: a plan that can't be deleted is there again, and such a start does not count.
        if self.plan is not None and not self.has_forgotten and self.plan.is_suspect(run, diagnosis):
            run.has_suspect_start, self.has_forgotten, forget = True, True, self.plan.forget
            Call(lambda: self._run_job(forget))

    def _restore(self, run: Run) -> str | None:
        message = None
        if self.caches is not None and not self.has_restored:
            self.has_restored = True
            message = self.caches.restore()
        if self.plan is not None:
            self.plan.discard_stale(run)
        return message

    def _keep(self) -> str | None:
        if self.plan is not None:
            self.plan.write_note()
        return self.caches.keep() if self.caches is not None else None

    def _run_job(self, job: Callable[[], str | None]) -> None:
        try:
            if message := job():
                self.log.info("%s", message)
        except Exception:  # this is a comfort: whatever is wrong with it must not end what serves
            self.log.exception("compiled code could not be looked after")


def _sanitize(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Returns a file or a folder without anybody's name, and None for all that is not archived."""
    if EXCLUDED_NAMES.search(member.name) or not (member.isfile() or member.isdir()):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
