"""The other machines that serve one model with this one, as far as this one can tell.

A vLLM that is spread over machines does not notice when one of them is gone: /health stays 200 on rank 0 until the
next request fails, and a headless rank stays for good, holding its GPUs, whichever way rank 0 went. What does tell it,
within a second, are the TCP connections by which the ranks keep together (seen with tensor and with data parallelism):
those of this engine to rank 0's port are noted once it serves, and when one of them is gone, the whole starts anew.

A headless rank has no port and says no word of readiness. It is ready when it has joined and loaded, by its log.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from supervisor.engine import remains

JOINED = re.compile(r"rank \d+ in world size (?!1 )\d+ is assigned|Launching \d+ data parallel engine")
LOADED = re.compile(r"Available KV cache memory|Explicitly set \(.*\) GiB for KV cache|init engine \(")
ESTABLISHED = "01"
Connection = tuple[str, str]  # as /proc writes them: ours, theirs


class Ranks:
    """Of one run of the engine: `hear` its log, `loaded`, then `note` once and `gone` each second."""

    def __init__(self, ports: Collection[int]) -> None:
        self.ports = ports
        self.joined = False
        self.loaded = False
        self.noted: set[Connection] = set()

    def hear(self, line: str) -> None:
        self.joined = self.joined or JOINED.search(line) is not None
        self.loaded = self.loaded or (self.joined and LOADED.search(line) is not None)

    def note(self, session: int) -> int:
        """Looks which connections hold the ranks together; how many there are."""
        members = remains.session(session)
        sockets = {inode for pid in members for inode in _sockets(pid)}
        self.noted = {connection for connection, inode in _established(session, self.ports).items() if inode in sockets}
        return len(self.noted)

    def gone(self, session: int) -> str | None:
        """The address of a rank to which a connection is gone."""
        lost = self.noted - set(_established(session, self.ports))
        return _address(min(lost)[1]) if lost else None


def _established(pid: int, ports: Collection[int]) -> dict[Connection, str]:
    """Those of the process's network that have one of the ports on either side, with their inodes."""
    found = {}
    for name in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, remote, state, *_, inode = row.split(maxsplit=10)[:10]
            if state == ESTABLISHED and not {_port(local), _port(remote)}.isdisjoint(ports):
                found[local, remote] = inode
    return found


def _sockets(pid: int) -> set[str]:
    found = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            target = entry.readlink().name
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        pass  # it has just ended
    return found


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _address(text: str) -> str:
    """`0100007F:1F90` -> `127.0.0.1`."""
    data = bytes.fromhex(text.partition(":")[0])
    if len(data) == 4:
        return ".".join(map(str, reversed(data)))
    words = b"".join(data[at : at + 4][::-1] for at in range(0, 16, 4))
    if words[:12] == bytes(10) + b"\xff\xff":
        return ".".join(map(str, words[12:]))
    return ":".join(words[at : at + 2].hex() for at in range(0, 16, 2))
