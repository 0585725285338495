"""What vLLM compiles (torch.compile, Triton, FlashInfer, CUDA's own), kept from one container to the next.

vLLM writes into a folder of this container, always under the same name, since compiled code names its own files. When
it is ready, that folder goes to the volume as one archive, by a rename; the next start unpacks it while vLLM imports.
So workers that share a volume never see half of what another one writes, a network volume carries one large file
instead of thousands of small ones, and a full or read-only volume costs the next start its time and nothing else. The
archive's name has vLLM's version, the GPU and the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import stat
import tarfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

NVIDIA = Path("/proc/driver/nvidia/gpus")
# Variable -> folder below ours. Where the user set one, it stays. vLLM keeps Inductor's below its own.
FOLDERS = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}
# A larger one takes longer to carry than to compile; it is rather a cache of something else.
LARGEST = 4 * 1024**3
# Half-written ones, by workers that died, are removed after so many seconds.
STALE = 3600.0


def machine() -> str:
    """What compiled code is for: the GPUs' name, or this processor with what it can do."""
    with contextlib.suppress(OSError):
        names = {
            found[1].strip()
            for path in NVIDIA.glob("*/information")
            if (found := re.search(r"Model:(.*)", path.read_text()))
        }
        if names:
            return "+".join(sorted(names))
    flags = ""
    with contextlib.suppress(OSError):
        found = re.search(r"(?m)^(flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text())
        flags = " ".join(sorted(found[2].split())) if found else ""
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"


class Caches:
    """`environment` for vLLM; `restore()` while it imports; `keep()` when it is ready. All three may be left out."""

    def __init__(self, base: Path, store: Path, *, version: str, model: str) -> None:
        """`base`: a folder for temporary files; `store`: on the volume. Raises OSError where `base` is not safe."""
        name = re.sub(r"[^\w.+-]+", "-", f"{version}-{machine()}-{model}").strip("-")[:180]
        ours = base / f"vllm-supervisor-{os.getuid()}"
        ours.mkdir(mode=0o700, exist_ok=True)
        facts = ours.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
            raise PermissionError(f"{ours} is somebody else's")  # code lies there, which is run
        self.folder = ours / name
        self.archive = store / f"{name}.tar"
        self.restored: set[str] = set()
        self.lock = threading.Lock()

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {name: str(self.folder / part) for name, part in FOLDERS.items() if not environ.get(name)}

    def restore(self) -> str:
        """Unpacks what another start left; what happened, in words."""
        with self.lock:
            if self.folder.is_dir():
                self.restored = self._content()
                return f"compiled code of an earlier start is here: {self.folder}"
            began = time.monotonic()
            half = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.half")
            shutil.rmtree(half, ignore_errors=True)
            try:
                with tarfile.open(self.archive) as archive:
                    archive.extractall(half, filter="data")
                size = self.archive.stat().st_size
            except FileNotFoundError:
                return "no compiled code is kept for this vLLM, GPU and model yet"
            except (OSError, tarfile.TarError) as error:
                shutil.rmtree(half, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self.archive.unlink()
                return f"compiled code that was kept can't be read ({error}): it is made anew"
            try:
                half.rename(self.folder)
            except OSError:  # vLLM was quicker, and has begun its own
                shutil.rmtree(half, ignore_errors=True)
                return "compiled code that was kept came too late"
            self.restored = self._content()
            return f"compiled code of an earlier start: {size / 1e6:.0f} MB in {time.monotonic() - began:.1f} s"

    def keep(self) -> str | None:
        """Puts what is there now onto the volume, where it is more than was there before."""
        with self.lock:
            content = self._content()
            if not content - self.restored:
                return None
            size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            if size > LARGEST:
                return f"compiled code is not kept: {size / 1e9:.1f} GB are too many"
            half = self.archive.with_name(f".{os.uname().nodename}-{os.getpid()}.half")
            try:
                self.archive.parent.mkdir(parents=True, exist_ok=True)
                self._sweep()
                with tarfile.open(half, "w") as archive:
                    archive.add(self.folder, ".", filter=_kept)
                half.replace(self.archive)
            except OSError as error:
                with contextlib.suppress(OSError):
                    half.unlink()
                return f"compiled code can't be kept at {self.archive.parent} ({error.strerror or error})"
            self.restored = content
            return f"compiled code kept for the next start: {size / 1e6:.0f} MB, {self.archive}"

    def _content(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}

    def _sweep(self) -> None:
        for path in self.archive.parent.glob(".*.half"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()


def _kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """No locks, nothing that is another machine's (which GPUs reach which), and nobody's name."""
    if re.search(r"\.(lock|tmp)$|gpu_p2p_access_cache|startup_plan", member.name) or not (
        member.isfile() or member.isdir()
    ):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
