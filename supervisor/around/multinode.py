"""Watches the other machines that serve one model with this one, as far as this one can tell.

A vLLM that is spread over machines does not notice when one of them is gone: /health stays 200 on rank 0 until the
next request fails, and a headless rank stays for good, holding its GPUs, whichever way rank 0 went. The TCP connections
between the ranks do tell it, within a second: those of this engine are noted once it serves, and when one of them is
gone, the whole starts anew. Where the model is spread (tensor, pipeline parallelism), they are those to the port of
rank 0 that all know. With data parallelism vLLM chooses its ports as it goes, all on rank 0.

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

LAUNCH_LINE = re.compile(r"Launching (?:vLLM .* headless|(?P<engines>\d+) data parallel engine)")
JOIN_LINE = re.compile(r"rank \d+ in world size \d+ is assigned")
# So a worker says how much memory its weights leave: profiled, on a CPU, and where the user set it.
LOAD_LINE = re.compile(r"Available KV cache memory|\) GiB for KV cache on node|GiB memory for KV Cache as specified")
INIT_LINE = re.compile(r"init engine \(")
ESTABLISHED, LISTENING = "01", "0A"
# So many seconds lie between two looks at the connections. A data-parallel rank connects soon after it is ready.
LOOK_INTERVAL, MAX_LOOKS = 1.0, 60
LOOK_PATIENCE = 10.0
Endpoints = tuple[str, str]  # of a connection, as /proc writes them: our end, their end


class Ranks:
    """Follows one run: `hear` its log until `is_loaded`, `note_connections` until some are there, `find_lost_rank`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.pending_lines: list[re.Pattern[str]] | None = None  # what a headless rank has still to say
        self.connections: set[Endpoints] = set()

    def hear(self, line: str) -> None:
        if self.pending_lines is None:
            if launch := LAUNCH_LINE.search(line):
                engines = launch["engines"]
                # A line of each engine process is awaited: until then it has only shaken hands with rank 0.
                self.pending_lines = [INIT_LINE] * int(engines) if engines else [JOIN_LINE, LOAD_LINE]
        elif self.pending_lines and self.pending_lines[0].search(line):
            del self.pending_lines[0]

    @property
    def is_loaded(self) -> bool:
        return self.pending_lines == []

    def note_connections(self, session: Session) -> int:
        """Notes which connections hold the ranks together, and returns how many there are."""
        inodes = {inode for pid in session.members() for inode in _read_socket_inodes(pid)}
        rows = [(ends, state) for ends, state, inode in _read_connections() if inode in inodes]
        pairs = {ends for ends, state in rows if state == ESTABLISHED}
        ports = {_port(ends[0]) for ends, state in rows if state == LISTENING}
        address_pairs = {tuple(map(_address, ends)) for ends in pairs}  # two of our own processes have both ends
        self.connections = {
            (local, remote)
            for local, remote in pairs
            if (_address(remote), _address(local)) not in address_pairs and self._is_rank_pair(local, remote, ports)
        }
        return len(self.connections)

    def find_lost_rank(self) -> str | None:
        """Returns the address of a rank to which a connection is gone."""
        lost = self.connections - {ends for ends, state, _ in _read_connections() if state == ESTABLISHED}
        return _address(min(lost)[1])[0] if lost else None

    def _is_rank_pair(self, local: str, remote: str, ports: set[int]) -> bool:
        port = self.cluster.port
        if not self.cluster.is_replicated:
            return port in (_port(local), _port(remote))
        if port in (_port(local), _port(remote)):
            return False  # this is the handshake, which ends when all have come
        if self.cluster.is_headless:
            return _address(remote)[0] in _resolve_host(self.cluster.leader)
        return _port(local) in ports


class Multinode(Observer):
    """Ends a run when another rank is gone: all of them have to start again together."""

    def __init__(self, cluster: Cluster, drain_timeout: float) -> None:
        self.cluster = cluster
        self.drain_timeout = drain_timeout
        self.log = logging.getLogger("supervisor.multinode")
        self.ranks = Ranks(cluster)
        self.is_draining = False
        self._watch_task: asyncio.Task[None] | None = None

    def run_began(self, run: Run) -> None:
        self.ranks = Ranks(self.cluster)
        self._watch_task = asyncio.get_running_loop().create_task(self._watch(run, self.ranks))

    def lines_logged(self, run: Run, lines: Sequence[str]) -> None:
        for line in lines:
            self.ranks.hear(line)

    async def run_answered(self, run: Run) -> None:
        """From the first request on, the end of another rank is noticed."""
        if run.child is not None:
            session = run.child.session
            await run_bounded(LOOK_PATIENCE, lambda: self.ranks.note_connections(session))

    def run_removed(self) -> None:
        if self._watch_task is not None:
            self._watch_task.cancel()

    async def ask(self, path: str, body: bytes, patience: float) -> tuple[int, bytes] | None:
        """Answers what a headless rank would say of its health, if it had a port."""
        return (200, b"") if path == "/health" and self.ranks.is_loaded else None

    async def drain(self) -> bool:
        """Waits on a headless rank until another is gone: those that stop together get their signals at once, and
        rank 0's last answers need this one."""
        self.is_draining = True
        try:
            async with asyncio.timeout(self.drain_timeout):
                while self.ranks.connections and await run_bounded(LOOK_PATIENCE, self.ranks.find_lost_rank) is None:  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_INTERVAL / 4)
        except TimeoutError:
            pass
        return True

    async def _watch(self, run: Run, ranks: Ranks) -> None:
        """Notices when another machine is gone, which vLLM itself does not."""
        session, look_count = run.child.session if run.child is not None else Session(0), 0
        try:
            while look_count < MAX_LOOKS:
                await asyncio.sleep(LOOK_INTERVAL)
                if not run.was_ready:
                    continue
                if not ranks.connections:
                    look_count += 1
                    await run_bounded(LOOK_PATIENCE, lambda: ranks.note_connections(session))
                elif (address := await run_bounded(LOOK_PATIENCE, ranks.find_lost_rank)) is not None:
                    # A headless rank that drains waits for just this.
                    if not (self.is_draining and self.cluster.is_headless):
                        run.mark_broken("rank gone", f"the rank at {address} is gone: all of them have to start again")
                    return
            self.log.warning("no connection to another rank is to be seen: the end of one will not be noticed")
        except Exception:  # the engine serves without this watch
            self.log.exception("the end of another rank will not be noticed")


def _read_connections() -> list[tuple[Endpoints, str, str]]:
    """Returns ends, state and inode of each TCP socket of this network, which is the engine's too."""
    connections = []
    for name in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, remote, state, *_, inode = row.split(maxsplit=10)[:10]
            connections.append(((local, remote), state, inode))
    return connections


def _read_socket_inodes(pid: int) -> set[str]:
    inodes = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            target = entry.readlink().name
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    except OSError:
        pass  # the process has just ended
    return inodes


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2], 16)


def _address(endpoint: str) -> tuple[str, int]:
    """Returns 127.0.0.1 and 8080 for `0100007F:1F90`. A socket for both IPs writes IPv4 as IPv6."""
    data = bytes.fromhex(endpoint.partition(":")[0])
    words = b"".join(data[offset : offset + 4][::-1] for offset in range(0, len(data), 4))
    return _format_address(ipaddress.ip_address(words)), _port(endpoint)


def _format_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _resolve_host(host: str) -> set[str]:
    try:
        addresses = {str(row[4][0]).partition("%")[0] for row in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
    return {_format_address(ipaddress.ip_address(address)) for address in addresses}
