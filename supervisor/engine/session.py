"""Finds the processes of one vLLM by their session, and what they leave in shared memory.

vLLM renames its processes, which overwrites their command lines and environments, and orphans lose their parent: the
session's number alone finds them. But a number comes again, and a stranger's session was killed for that. The kernel
gives none away while a process has it as its own or as its session's. So a session is ours as long as one process that
was seen in it is there, with the start that it had; and vLLM's first process stays, as a zombie, to the end (child.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
# Killed processes may take so many seconds to go; one in uninterruptible sleep (a hung driver) may never be gone.
KILL_PATIENCE = 10.0


@dataclass(slots=True)
class Session:
    """`processes`: pid -> start time, as last looked up. `segments`: the files in /dev/shm that they have mapped:
    two and a semaphore (420 MB by size, sparse), which nothing removes after a kill; a container has room for 64 MB."""

    sid: int
    processes: dict[int, str] = field(default_factory=dict)
    segments: set[str] = field(default_factory=set)

    @classmethod
    def from_leader(cls, pid: int) -> Session:
        return cls(pid, {pid: start_time(pid)})

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> Session:
        """Reads what `to_note` made. Raises KeyError, TypeError, AttributeError or ValueError for something else."""
        processes = {int(pid): str(start) for pid, start in note["seen"].items()}
        return cls(int(note["session"]), processes, set(map(str, note["segments"])))

    def to_note(self) -> dict[str, Any]:
        return {"session": self.sid, "seen": self.processes, "segments": sorted(self.segments)}

    def members(self) -> list[int]:
        """Returns its living processes without the zombies; none where the number is somebody else's now."""
        import psutil  # noqa: PLC0415  # 20 ms that vLLM's start does not wait for

        starts = {}
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if os.getsid(pid) == self.sid and (start := start_time(pid)):
                    starts[pid] = start
        if not starts.items() & self.processes.items():
            return []
        self.processes = starts
        members = []
        for pid in starts:
            with contextlib.suppress(psutil.Error):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    members.append(pid)
        return members

    def inspect(self) -> list[int]:
        """Returns its members, and notes the shared memory that they have mapped: by inode, for a semaphore is mapped
        by a name that is gone (`sem.XXXXXX (deleted)`), and linked as `sem.mp-...`."""
        members, inodes = self.members(), set[int]()
        for pid in members:
            with contextlib.suppress(OSError), Path(f"/proc/{pid}/maps").open() as maps:
                inodes.update(int(line.split(None, 5)[4]) for line in maps if f"{SHARED_MEMORY}/" in line)
        with contextlib.suppress(OSError):
            self.segments |= {entry.path for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes}
        return members

    def remove(self) -> list[int]:
        """Kills all its processes, and removes their shared memory; returns the pids of what would not die."""
        deadline = time.monotonic() + KILL_PATIENCE
        survivors = self.inspect()
        while survivors and time.monotonic() < deadline:
            for pid in survivors:
                _kill(pid, self.processes[pid])
            time.sleep(0.002)  # they are not all our children: there is nothing to wait on
            survivors = self.members()
        for segment in map(Path, self.segments if not survivors else ()):
            with contextlib.suppress(OSError):
                (SHARED_MEMORY / segment.name).unlink()
        return survivors


def _kill(pid: int, start: str) -> None:
    """Kills by a pidfd, where there are such: from its opening on it is that process and no other."""
    with contextlib.suppress(ProcessLookupError):
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:  # an old kernel, or forbidden here; or the process is gone
            if not isinstance(error, ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        try:
            if start_time(pid) == start:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def start_time(pid: int) -> str:
    """Returns a process's start, in the kernel's ticks; with the pid it names one process for good. Empty: none."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
