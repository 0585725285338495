"""What a killed vLLM leaves behind, and the guard that removes it even when the supervisor itself is killed.

Each killed vLLM leaves two shared-memory segments (420 MB by size, sparse) and a semaphore in /dev/shm, which nothing
removes; a container's /dev/shm has 64 MB, so a few crashes would be the last. Which segments are the engine's is read
from its processes' memory maps while they live, and exactly those are unlinked after its session is dead. Sockets and
temporary files lie in the workspace and go with it.

The guard is a fork made before anything else: it sleeps on a pipe, and when the supervisor dies without a word, it
kills the session and removes what it was told of. A second supervisor that finds such a workspace without a living
owner does the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SHARED_MEMORY = "/dev/shm/"  # noqa: S108
PREFIX = "supervisor-"
# The gateway's private socket in the workspace, for the queue worker and `supervisor status`.
GATEWAY = "gateway.sock"
# A socket's path may have 107 bytes on Linux, 103 on macOS.
LONGEST_FOLDER = 80
# How long killed processes may take to be gone; a process in uninterruptible sleep (a hung driver) may never be.
KILL_PATIENCE = 10.0


def session(sid: int) -> list[int]:
    """The living processes of a session. Zombies are none."""
    import psutil  # noqa: PLC0415  # 20 ms that vLLM's start does not wait for

    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == sid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def kill_session(sid: int, patience: float = KILL_PATIENCE) -> list[int]:
    """SIGKILL to all of it until none is left, or for `patience` s; returns what would not die."""
    deadline = time.monotonic() + patience
    while left := session(sid):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(0.005)  # they are not all our children: there is nothing to wait on
    return []


def segments(pids: Iterable[int]) -> set[str]:
    """The files in /dev/shm that these processes have mapped.

    Found by inode: a semaphore is mapped by a name that is gone (`sem.XXXXXX (deleted)`), and linked as `sem.mp-...`.
    """
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError), Path(f"/proc/{pid}/maps").open() as maps:
            inodes.update(int(line.split(None, 5)[4]) for line in maps if SHARED_MEMORY in line)
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(SHARED_MEMORY):
            if entry.inode() in inodes:
                found.add(entry.path)
    return found


def unlink(paths: Iterable[str]) -> None:
    for path in paths:
        if path.startswith(SHARED_MEMORY) and "/" not in path.removeprefix(SHARED_MEMORY):
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108


class Workspace:
    """A private folder (0700): the socket, vLLM's temporary files, and a note of what would have to be removed.

    The note's file is locked for as long as its supervisor lives, which is how another one tells a leftover.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path / "tmp"
        self.socket = path / "vllm.sock"
        self.gateway = path / GATEWAY
        self.note = path / "remains.json"

    @classmethod
    def create(cls, base: Path) -> Workspace:
        """Raises OSError where `base` can't be written."""
        # Locked under another name: without a lock it were a leftover for another that starts at the same moment.
        made = cls(Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=base)))
        made.temporary.mkdir()
        lock = os.open(made.note, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        workspace = cls(made.path.rename(base / made.path.name.removeprefix(".")))
        workspace.lock = lock
        return workspace

    lock: int

    def remember(self, sid: int, paths: Iterable[str]) -> None:
        """Notes the session that runs now, with its start, and its segments."""
        text = json.dumps({"session": sid, "started": started(sid), "segments": sorted(paths)}).encode()
        with contextlib.suppress(OSError):  # a full disk: the guard still knows
            # In this order: killed between the two, the note still begins with what is true now.
            os.pwrite(self.lock, text, 0)
            os.ftruncate(self.lock, len(text))

    def recall(self) -> tuple[int, str, list[str]] | None:
        """What `remember` wrote last: session, its start, segments."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note, _ = json.JSONDecoder().raw_decode(self.note.read_text())
            return int(note["session"]), str(note["started"]), list(note["segments"])
        return None

    def clear(self) -> None:
        """Removes what one run of vLLM left, for the next."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.temporary.mkdir()
        self.socket.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def started(pid: int) -> str:
    """When a process started, in the kernel's ticks: with the pid it names one process for good."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def leftovers(base: Path) -> Iterator[Workspace]:
    """Workspaces of this user whose supervisor is gone. Each is locked for us until it is removed."""
    for path in base.glob(f"{PREFIX}*"):
        workspace = Workspace(path)
        try:
            if path.stat().st_uid != os.getuid():
                continue
            workspace.lock = os.open(workspace.note, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(workspace.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # somebody's who lives, or not ours at all
        yield workspace


def temporary_folder(environ: Mapping[str, str]) -> Path:
    """Where workspaces go. Not Python's own choice, which writes a file to try it and fails on a full disk."""
    asked = environ.get("TMPDIR") or "/tmp"  # noqa: S108
    return Path(asked if len(asked) < LONGEST_FOLDER else "/tmp")  # noqa: S108


def clean_leftovers(base: Path) -> list[Path]:
    """Ends and removes what a killed supervisor left, and nothing else's; returns the workspaces that are gone."""
    removed = []
    for workspace in leftovers(base):
        note = workspace.recall()
        if note is not None:
            sid, start, paths = note
            # The leader may be gone while its orphans live; another process may have its number now.
            if started(sid) in ("", start):
                kill_session(sid)
            unlink(paths)
        workspace.remove()
        os.close(workspace.lock)
        removed.append(workspace.path)
    return removed


class Guard:
    """`Guard(workspace)` forks; `watch` tells it what to remove; `dismiss` sends it away."""

    def __init__(self, workspace: Workspace) -> None:
        reader, self.pipe = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _stand_guard(reader, workspace)
            finally:
                os._exit(0)
        os.close(reader)

    def watch(self, sid: int, paths: Iterable[str]) -> None:
        with contextlib.suppress(OSError):  # somebody killed it: the next start cleans up instead
            os.write(self.pipe, json.dumps([sid, sorted(paths)]).encode() + b"\n")

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self.pipe, b"null\n")
        os.close(self.pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _stand_guard(reader: int, workspace: Workspace) -> None:
    os.setsid()  # Ctrl-C and a closing terminal are for the supervisor
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # It must hold nothing open that somebody waits to see closed: our output, the listening sockets, its own pipe.
    os.dup2(reader, 0)
    os.dup2(workspace.lock, 3)
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) > 3:
            with contextlib.suppress(OSError):
                os.close(int(entry.name))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    buffer = b""
    while data := os.read(0, 65536):
        buffer = (buffer + data)[-(1 << 20) :]
    lines = buffer.split(b"\n")
    told = json.loads(lines[-2]) if len(lines) > 1 else None
    if told is not None:
        sid, paths = told
        paths = set(paths) | segments(session(sid))
        kill_session(sid)
        unlink(paths)
        workspace.remove()
