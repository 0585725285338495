"""The other machines that serve one model with this one, as far as this one can tell.

A vLLM that is spread over machines does not notice when one of them is gone: /health stays 200 on rank 0 until the
next request fails, and a headless rank stays for good, holding its GPUs, whichever way rank 0 went. What does tell it,
within a second, are the TCP connections between the ranks: those of this engine are noted once it serves, and when one
of them is gone, the whole starts anew. Where the model is spread (tensor, pipeline parallelism) they are those to the
port of rank 0 that all know. With data parallelism vLLM chooses its ports as it goes, all on rank 0.

A headless rank has no port and says no word of readiness. It is ready when it has joined and loaded, by its log.

All of it is `Multinode`, one observer of the engine; on a headless rank it stands for the HTTP that is not there, too.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from supervisor.bounded import run_bounded
from supervisor.engine.run import Observer, Run
from supervisor.engine.session import Session
from supervisor.settings.cluster import Cluster

LAUNCHED = re.compile(r"Launching (?:vLLM .* headless|(?P<engines>\d+) data parallel engine)")
JOINED = re.compile(r"rank \d+ in world size \d+ is assigned")
# What a worker says of the memory that its weights leave: profiled, on a CPU, and where the user set it.
LOADED = re.compile(r"Available KV cache memory|\) GiB for KV cache on node|GiB memory for KV Cache as specified")
INITIALIZED = re.compile(r"init engine \(")
ESTABLISHED, LISTENING = "01", "0A"
# Seconds between two looks whether the other machines are there. A data-parallel rank connects soon after it is ready.
INTERVAL, LOOKS = 1.0, 60
LOOK_PATIENCE = 10.0
Ends = tuple[str, str]  # of a connection, as /proc writes them: ours, theirs


class Ranks:
    """Of one run of the engine: `hear` its log, `loaded`, then `note` until there is something, and `gone`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.awaited: list[re.Pattern[str]] | None = None  # what a headless rank has still to say
        self.noted: set[Ends] = set()

    def hear(self, line: str) -> None:
        if self.awaited is None:
            if launched := LAUNCHED.search(line):
                engines = launched["engines"]
                # With its engine process another one is awaited: until then it has only shaken hands with rank 0.
                self.awaited = [INITIALIZED] * int(engines) if engines else [JOINED, LOADED]
        elif self.awaited and self.awaited[0].search(line):
            del self.awaited[0]

    @property
    def loaded(self) -> bool:
        return self.awaited == []

    def note(self, session: Session) -> int:
        """Looks which connections hold the ranks together; how many there are."""
        sockets = {inode for pid in session.members() for inode in _sockets(pid)}
        rows = [(ends, state) for ends, state, inode in _connections() if inode in sockets]
        ours = {ends for ends, state in rows if state == ESTABLISHED}
        listening = {_port(ends[0]) for ends, state in rows if state == LISTENING}
        within = {tuple(map(_address, ends)) for ends in ours}  # between two of our own processes both ends are ours
        self.noted = {
            (mine, other)
            for mine, other in ours
            if (_address(other), _address(mine)) not in within and self._holds(mine, other, listening)
        }
        return len(self.noted)

    def gone(self) -> str | None:
        """The address of a rank to which a connection is gone."""
        lost = self.noted - {ends for ends, state, _ in _connections() if state == ESTABLISHED}
        return _address(min(lost)[1])[0] if lost else None

    def _holds(self, mine: str, other: str, listening: set[int]) -> bool:
        port = self.cluster.port
        if not self.cluster.is_replicated:
            return port in (_port(mine), _port(other))
        if port in (_port(mine), _port(other)):
            return False  # of the handshake, which ends when all have come
        if self.cluster.is_headless:
            return _address(other)[0] in _addresses(self.cluster.leader)
        return _port(mine) in listening


class Multinode(Observer):
    """Ends a run when another rank is gone: all of them have to start again together."""

    def __init__(self, cluster: Cluster, drain_timeout: float) -> None:
        self.cluster = cluster
        self.drain_timeout = drain_timeout
        self.log = logging.getLogger("supervisor.multinode")
        self.ranks = Ranks(cluster)
        self.draining = False
        self._watching: asyncio.Task[None] | None = None

    def began(self, run: Run) -> None:
        self.ranks = Ranks(self.cluster)
        self._watching = asyncio.get_running_loop().create_task(self._watch(run, self.ranks))

    def heard(self, run: Run, lines: Sequence[str]) -> None:
        for line in lines:
            self.ranks.hear(line)

    async def answers(self, run: Run) -> None:
        """From the first request on, the end of another rank is noticed."""
        if run.child is not None:
            session = run.child.session
            await run_bounded(LOOK_PATIENCE, lambda: self.ranks.note(session))

    def removed(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def ask(self, path: str, body: bytes, patience: float) -> tuple[int, bytes] | None:
        """What a headless rank would say of its health, if it had a port."""
        return (200, b"") if path == "/health" and self.ranks.loaded else None

    async def drain(self) -> bool:
        """Of a headless rank: those that are stopped together get their signals at once, and rank 0's last answers need
        this one."""
        self.draining = True
        try:
            async with asyncio.timeout(self.drain_timeout):
                while self.ranks.noted and await run_bounded(LOOK_PATIENCE, self.ranks.gone) is None:  # noqa: ASYNC110
                    await asyncio.sleep(INTERVAL / 4)
        except TimeoutError:
            pass
        return True

    async def _watch(self, run: Run, ranks: Ranks) -> None:
        """vLLM itself does not notice when another machine is gone."""
        session, looks = run.child.session if run.child is not None else Session(0), 0
        try:
            while looks < LOOKS:
                await asyncio.sleep(INTERVAL)
                if not run.served:
                    continue
                if not ranks.noted:
                    looks += 1
                    await run_bounded(LOOK_PATIENCE, lambda: ranks.note(session))
                elif (address := await run_bounded(LOOK_PATIENCE, ranks.gone)) is not None:
                    # A headless rank that drains waits for just this.
                    if not (self.draining and self.cluster.is_headless):
                        run.broke("rank gone", f"the rank at {address} is gone: all of them have to start again")
                    return
            self.log.warning("no connection to another rank is to be seen: the end of one will not be noticed")
        except Exception:  # the engine serves without this watch
            self.log.exception("the end of another rank will not be noticed")


def _connections() -> list[tuple[Ends, str, str]]:
    """Of this network, which is the engine's too: ends, state, inode."""
    found = []
    for name in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, mine, other, state, *_, inode = row.split(maxsplit=10)[:10]
            found.append(((mine, other), state, inode))
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


def _port(text: str) -> int:
    return int(text.rpartition(":")[2], 16)


def _address(text: str) -> tuple[str, int]:
    """`0100007F:1F90` -> 127.0.0.1, 8080. A socket for both IPs writes IPv4 as IPv6."""
    data = bytes.fromhex(text.partition(":")[0])
    words = b"".join(data[at : at + 4][::-1] for at in range(0, len(data), 4))
    return _plain(ipaddress.ip_address(words)), _port(text)


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _addresses(host: str) -> set[str]:
    try:
        found = {str(row[4][0]).partition("%")[0] for row in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
    return {_plain(ipaddress.ip_address(text)) for text in found}
