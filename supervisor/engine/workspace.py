"""A workspace is a supervisor's private folder; those of killed supervisors are cleaned up here.

It holds the sockets, vLLM's temporary files and a note of the session that would have to be removed. The note is locked
while its supervisor lives, which is how another one tells a leftover. The temporary folder is everybody's: what lies
there is believed only where it is this user's, and no link (one once had root's supervisor kill a stranger's session).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from supervisor.engine.session import Session

PREFIX = "supervisor-"
# The name of a folder that is being made begins so until it is locked, which takes a millisecond. After this many
# seconds it is a dead supervisor's.
DRAFT_PREFIX, DRAFT_LIFETIME = f".{PREFIX}", 60.0
# A socket's path may have so many bytes, and our longest is such a one in a temporary folder.
LONGEST_FOLDER = (107 if sys.platform == "linux" else 103) - len(f"/{PREFIX}12345678/gateway.sock")


class Workspace:
    """A private folder (0700), with `note` locked by whoever owns it."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, -1
        self.temp_folder = path / "tmp"
        self.socket = path / "vllm.sock"
        self.gateway_socket = path / "gateway.sock"  # private, for the queue worker and `supervisor status`
        self.note = path / "remains.json"

    @classmethod
    def create(cls, base: Path) -> Workspace:
        """Makes one in `base`, and locks it. Raises OSError where `base` can't be written."""
        # It is locked under another name: without a lock it would be a leftover to one that starts at the same moment.
        draft = cls(Path(tempfile.mkdtemp(prefix=DRAFT_PREFIX, dir=base)))
        draft.temp_folder.mkdir()
        lock = os.open(draft.note, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        workspace = cls(draft.path.rename(base / draft.path.name.removeprefix(".")))
        workspace.lock = lock
        return workspace

    def claim(self) -> bool:
        """Locks it where it has no owner; returns False where it has one, or its note is not to be trusted."""
        try:
            self.lock = lock = os.open(self.note, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        facts = os.fstat(lock)
        if stat.S_ISREG(facts.st_mode) and facts.st_uid == os.getuid():
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        os.close(lock)
        return False

    def remember(self, session: Session | None) -> None:
        """Notes what would have to be removed; None while no engine lives."""
        text = json.dumps(session.to_note() if session is not None else None).encode()
        with contextlib.suppress(OSError):  # a full disk: the guard still knows
            # In this order, if we are killed between the two, the note still begins with what is true now.
            os.pwrite(self.lock, text, 0)
            os.ftruncate(self.lock, len(text))

    def clear(self) -> None:
        """Removes what one run of vLLM left, for the next."""
        shutil.rmtree(self.temp_folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.temp_folder.mkdir()
        self.socket.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_with_session(self) -> None:
        """Removes a killed supervisor's, which `claim` has locked, and the session that it noted last."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            note, _ = json.JSONDecoder().raw_decode(os.pread(self.lock, 1 << 20, 0).decode())
            Session.from_note(note).remove()
        self.remove()
        os.close(self.lock)


def temporary_folder(environ: Mapping[str, str]) -> Path:
    """Returns where workspaces go. Python's own choice writes a file to try it, and fails on a full disk."""
    folder = environ.get("TMPDIR") or "/tmp"  # noqa: S108
    return Path(folder if len(os.fsencode(folder)) <= LONGEST_FOLDER else "/tmp")  # noqa: S108


def is_ours(path: Path, kind: int = stat.S_IFDIR) -> bool:
    """Tells whether a path is of this kind, and this user's, and no folder in which somebody else can write."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    private = kind != stat.S_IFDIR or not facts.st_mode & 0o022
    return stat.S_IFMT(facts.st_mode) == kind and facts.st_uid == os.getuid() and private


def find_workspaces(base: Path, prefix: str = PREFIX) -> Iterator[Workspace]:
    """Returns this user's, in the order of their names, whether their supervisor lives or not."""
    return (Workspace(path) for path in sorted(base.glob(f"{prefix}*")) if is_ours(path))


def clean_leftovers(base: Path) -> None:
    """Ends and removes what killed supervisors left, and nothing of anybody else's."""
    for workspace in find_workspaces(base):
        if workspace.claim():
            workspace.remove_with_session()
    for draft in find_workspaces(base, DRAFT_PREFIX):
        with contextlib.suppress(OSError):
            is_old = time.time() - draft.path.lstat().st_mtime > DRAFT_LIFETIME
            if is_old and (draft.claim() or not draft.note.exists()):
                draft.remove()
