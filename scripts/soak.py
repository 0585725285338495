#!/usr/bin/env python3
"""Many clients, random faults, and an account of every request.

    .venv/bin/python scripts/soak.py --seconds 300 --clients 64
    .venv/bin/python scripts/soak.py --vllm .vllm/bin/vllm --model supervisor/demo/model \
        --served-as demo --clients 16 --crashes 20 --seconds 2400 --patience 300 --stall 60

Starts a supervisor over the fake vLLM (or the one named by --vllm), lets clients ask without a pause, and kills
and freezes vLLM's processes meanwhile. At the end every request must be accounted for:

    whole      a complete answer, or a complete stream
    ended      a stream that had begun and ended with an error event and its proper end
    refused    an error in the client's dialect (502, 503, 429)

Beside them, with --rascals, are clients with bad manners: they leave, say no more and still listen, pipeline hundreds
of requests, do not read, send a head byte by byte, or garbage. Of theirs, only what HTTP owes them is accounted for.

Anything else is a fault of ours: `cut` (a stream that stops without an end, a connection that closes without an answer)
and `hung` (no answer within --patience). The exit code is 0 only where there is none of them, where the supervisor left
with 0, logged no traceback, stayed below 150 MB, and where no process, shared memory or folder of its own is left.
Bounded in time and count; loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import psutil

ROOT = Path(__file__).resolve().parent.parent
SUPERVISOR = ROOT / ".venv" / "bin" / "supervisor"
MAX_REQUESTS = 500_000

# fault -> (the process that it hits, the signal, its weight beside the others)
FAULTS = {
    "kill API server": ("", signal.SIGKILL, 3),
    "kill EngineCore": ("VLLM::EngineCore", signal.SIGKILL, 3),
    "kill worker": ("VLLM::Worker", signal.SIGKILL, 3),
    "freeze EngineCore": ("VLLM::EngineCore", signal.SIGSTOP, 1),
}


MAX_MEMORY = 150_000_000
TRACEBACK = re.compile(r"^(?!\().*(?:Traceback|Exception in|Fatal error|never retrieved)", re.M)


@dataclass
class Account:
    """The outcomes of the requests. `problems` keeps the first few that should not be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    misdeeds: Counter[str] = field(default_factory=Counter)
    peak_memory: int = 0  # bytes, of the supervisor

    def add(self, outcome: str, seconds: float, description: str) -> None:
        self.outcomes[outcome] += 1
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        if outcome in ("cut", "hung") and len(self.problems) < 20:
            self.problems.append(f"{outcome} after {seconds:.2f} s: {description}")

    @property
    def total(self) -> int:
        return sum(self.outcomes.values())


class Client:
    """A client that asks again and again, on one connection for as long as that lasts."""

    def __init__(self, port: int, model: str, account: Account, patience: float, rng: random.Random) -> None:
        self.port = port
        self.model = model
        self.account = account
        self.patience = patience
        self.rng = rng
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set() and self.account.total < MAX_REQUESTS:
            started_at = time.monotonic()
            stream = self.rng.random() < 0.5
            try:
                async with asyncio.timeout(self.patience):
                    outcome, description = await self._ask(stream)
            except TimeoutError:
                outcome, description = "hung", "stream" if stream else "whole answer"
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                outcome, description = "cut", f"{'stream' if stream else 'whole answer'}: {error!r}"
            if outcome in ("hung", "cut"):
                self._close()
            self.account.add(outcome, time.monotonic() - started_at, description)
        self._close()

    def _close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None

    async def _ask(self, stream: bool) -> tuple[str, str]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        question = {"role": "user", "content": f"Hello number {self.rng.randrange(1000)}"}
        body = {"model": self.model, "messages": [question], "stream": stream, "max_tokens": self.rng.randrange(1, 60)}
        if self.rng.random() < 0.5:  # one of a few, which the cache (if any) answers, or several clients share
            question["content"] = f"Hello number {self.rng.randrange(6)}"
            body |= {"temperature": 0, "max_tokens": self.rng.choice((20, 50))}
        content = json.dumps(body).encode()
        plan = json.dumps({"token_interval": 0.01})
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
            b"X-Fake: %b\r\nContent-Length: %d\r\n\r\n%b" % (plan.encode(), len(content), content)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split()[1])
        if b"transfer-encoding: chunked" in head:
            answer = b"".join([chunk async for chunk in read_chunks(reader)])
        else:
            found = re.search(rb"content-length: (\d+)", head)
            if found is None:
                raise ValueError("no length")
            answer = await reader.readexactly(int(found[1]))
        if b"connection: close" in head:
            self._close()
        if status != 200:
            message = json.loads(answer)["error"]["message"]
            return ("refused" if status in (429, 502, 503) and message else "cut"), f"{status} {message}"
        if not stream:
            return ("whole" if json.loads(answer)["choices"][0]["finish_reason"] else "cut"), "whole answer"
        events = [line[6:] for line in answer.decode().split("\n") if line.startswith("data: ")]
        if not answer.endswith(b"data: [DONE]\n\n"):
            return "cut", f"stream of {len(events)} events without an end"
        last = json.loads(events[-2])
        for event in events[:-2]:
            json.loads(event)
        if "error" in last:
            return "ended", last["error"]["message"]
        return ("whole" if any(choice["finish_reason"] for choice in last["choices"]) else "cut"), "stream"


class Rascal(Client):
    """A client that does what none should, again and again, on a new connection each time."""

    async def run(self, stop: asyncio.Event) -> None:
        misdeeds = {
            "leaves": self._leave, "says no more": self._half_close, "pipelines": self._pipeline,
            "does not read": self._stall, "sends slowly": self._trickle_head, "sends garbage": self._send_garbage,
        }  # fmt: skip
        while not stop.is_set() and self.account.total < MAX_REQUESTS:
            name = self.rng.choice(list(misdeeds))
            started_at = time.monotonic()
            try:
                async with asyncio.timeout(self.patience):
                    self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 16)
                    outcome = await misdeeds[name]()
            except TimeoutError:
                outcome = "hung"
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                outcome, name = "cut", f"{name}: {error!r}"
            self._close()
            self.account.misdeeds[name.partition(":")[0]] += 1
            if outcome:
                self.account.add(outcome, time.monotonic() - started_at, name)

    def _request(self, *, tokens: int, stream: bool) -> bytes:
        messages = [{"role": "user", "content": f"Hello {self.rng.random()}"}]
        content = json.dumps(
            {"model": self.model, "messages": messages, "stream": stream, "max_tokens": tokens}
        ).encode()
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
            b'X-Fake: {"token_interval": 0.01}\r\nContent-Length: %d\r\n\r\n%b' % (len(content), content)
        )

    async def _leave(self) -> str:
        assert self.streams is not None
        request = self._request(tokens=500, stream=self.rng.random() < 0.5)
        self.streams[1].write(request[: self.rng.choice((len(request), self.rng.randrange(len(request))))])
        await asyncio.sleep(self.rng.uniform(0, 0.3))
        if self.rng.random() < 0.5:
            self.streams[1].transport.abort()
        return ""

    async def _half_close(self) -> str:
        assert self.streams is not None
        reader, writer = self.streams
        writer.write(self._request(tokens=20, stream=False))
        writer.write_eof()
        while (head := (await reader.readuntil(b"\r\n\r\n")).lower()).startswith(b"http/1.1 1"):
            pass
        length = re.search(rb"content-length: (\d+)", head)
        if length is None:
            raise ValueError("no length")
        await reader.readexactly(int(length[1]))
        if await reader.read():
            raise ValueError("more than its answer")
        return "whole" if b" 200 " in head[:16] else "refused"

    async def _pipeline(self) -> str:
        assert self.streams is not None
        reader, writer = self.streams
        count = self.rng.choice((20, 300, 1000))
        writer.write(b"GET /v1/nowhere HTTP/1.1\r\nHost: soak\r\n\r\n" * count)
        for _ in range(count):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))  # type: ignore[index]
        return "refused"

    async def _stall(self) -> str:
        assert self.streams is not None
        self.streams[1].write(self._request(tokens=2000, stream=True) * 3)
        cast(asyncio.Transport, self.streams[1].transport).pause_reading()
        await asyncio.sleep(self.rng.uniform(0, 1))
        return ""

    async def _trickle_head(self) -> str:
        assert self.streams is not None
        for byte in self._request(tokens=1, stream=False)[: self.rng.randrange(60)]:
            self.streams[1].write(bytes([byte]))
            await asyncio.sleep(0.005)
        return ""

    async def _send_garbage(self) -> str:
        assert self.streams is not None
        garbage = self.rng.choice((
            self.rng.randbytes(300), b"GET / HTTP/9.9\r\n\r\n", b"A: " * 30_000, b"\r\n" * 1000,
            self._request(tokens=3, stream=True) + b"\x16\x03\x01", b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        ))  # fmt: skip
        self.streams[1].write(garbage)
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(0.5):
                await self.streams[0].read()
        return ""


async def read_chunks(reader: asyncio.StreamReader):  # type: ignore[no-untyped-def]  # noqa: ANN201
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)


class Run:
    """The supervisor under test, and the faults of its engine."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.log = folder / "log"
        environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environ |= {
            "SUPERVISOR_VLLM": arguments.vllm,
            "PORT": "0",
            "TMPDIR": str(folder),
            # Every crash counts as the first: the limit of restarts is not tested here.
            "SUPERVISOR_MAX_RESTARTS": "10000",
            "SUPERVISOR_RESTART_WINDOW": "0.05",
            "SUPERVISOR_STALL_TIMEOUT": str(arguments.stall),
            "SUPERVISOR_HOLD_TIMEOUT": str(arguments.patience),
            "SUPERVISOR_RESPONSE_CACHE": arguments.cache,
            "SUPERVISOR_ALLOWED_HOSTS": "soak",
            "FAKE_VLLM_PLAN": '[{"shm": 1}]',
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(SUPERVISOR), "up", arguments.model], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    async def wait_for(self, pattern: str, seconds: float, times: int = 1) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while len(matches := list(re.finditer(pattern, self.read_log()))) < times:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"soak: waited for {pattern!r}; the log ends with:\n{self.read_log()[-3000:]}")
            await asyncio.sleep(0.05)
        return matches[times - 1]

    def find_engine(self) -> dict[str, int]:
        """Finds the pids of the engine's processes, by name; the API server's name is empty."""
        supervisor = psutil.Process(self.process.pid)
        pids = {}
        for leader in supervisor.children():
            with contextlib.suppress(psutil.Error, OSError):
                is_leader = os.getsid(leader.pid) == leader.pid and leader.name() != "VLLM::Zygote"
                if is_leader and leader.cmdline()[:1] != supervisor.cmdline()[:1]:
                    pids[""] = leader.pid
                    for part in leader.children(recursive=True):
                        pids[part.name()[:16]] = part.pid
        return pids

    async def inject_faults(self, arguments: argparse.Namespace, account: Account, rng: random.Random) -> None:
        """Injects one fault after the other, each when the engine has been ready for a moment."""
        for number in range(1, arguments.crashes + 1):
            await asyncio.sleep(rng.uniform(0.2, arguments.pause))
            names, weights = list(FAULTS), [weight for _, _, weight in FAULTS.values()]
            fault = rng.choices(names, weights)[0]
            target, signal_number, _ = FAULTS[fault]
            pid = self.find_engine().get(target[:16])
            if pid is None:
                raise SystemExit(f"soak: no process {target!r} to {fault}")
            os.kill(pid, signal_number)
            account.peak_memory = max(account.peak_memory, psutil.Process(self.process.pid).memory_info().rss)
            account.faults[fault] += 1
            await self.wait_for("starting -> ready", arguments.patience, number + 1)


def report(run: Run, account: Account, seconds: float, code: int, log: str | None) -> bool:
    """Prints the account. Returns True if nothing was lost and nothing is left."""
    print(f"{account.total} requests in {seconds:.0f} s, slowest {account.slowest_seconds:.2f} s")
    for outcome in ("whole", "ended", "refused", "cut", "hung"):
        print(f"  {outcome:8} {account.outcomes[outcome]}")
    faults = ", ".join(f"{count} x {fault}" for fault, count in account.faults.items())
    print(f"{run.read_log().count('starting -> ready') - 1} restarts: {faults}")
    if account.misdeeds:
        print("misdeeds: " + ", ".join(f"{count} x {misdeed}" for misdeed, count in account.misdeeds.items()))
    traceback = TRACEBACK.search(run.read_log())
    print(f"memory {account.peak_memory / 1e6:.0f} MB; tracebacks: {traceback[0] if traceback else 'none'}")
    for line in account.problems:
        print(f"  {line}")
    leftovers = [path.name for path in run.log.parent.iterdir() if path != run.log]
    print(f"exit code {code}; left behind: {', '.join(leftovers) or 'nothing'}")
    if log:
        Path(log).write_text(run.read_log())
    failed = account.outcomes["cut"] or account.outcomes["hung"] or code or leftovers or traceback
    return not failed and account.total > 0 and account.peak_memory < MAX_MEMORY


async def soak(arguments: argparse.Namespace, folder: Path) -> bool:
    rng = random.Random(arguments.seed)
    account = Account()
    run = Run(arguments, folder)
    try:
        port = int((await run.wait_for(r"supervisor: starting .* on http://\S+?:(\d+)\n", 30))[1])
        await run.wait_for("supervisor: ready: http", arguments.patience)
        model = arguments.served_as or arguments.model
        started_at = time.monotonic()
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(arguments.clients):
                client = Client(port, model, account, arguments.patience, random.Random(rng.random()))
                group.create_task(client.run(stop))
            for _ in range(arguments.rascals):
                rascal = Rascal(port, model, account, arguments.patience, random.Random(rng.random()))
                group.create_task(rascal.run(stop))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(arguments.seconds):
                    await run.inject_faults(arguments, account, rng)
            stop.set()
        seconds = time.monotonic() - started_at
        await run.wait_for("-> ready", arguments.patience, 1 + sum(account.faults.values()))
        run.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(run.process.wait, 60)
    finally:
        run.process.kill()
    return report(run, account, seconds, code, arguments.log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="how long it goes on at most")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rascals", type=int, default=0, help="clients with bad manners, beside them")
    parser.add_argument("--crashes", type=int, default=10_000, help="at most so many faults")
    parser.add_argument("--pause", type=float, default=3, help="at most so many seconds between two faults")
    parser.add_argument("--patience", type=float, default=60, help="a request that takes longer hangs")
    parser.add_argument("--cache", default="", help="SUPERVISOR_RESPONSE_CACHE, such as 20kB")
    parser.add_argument("--stall", type=float, default=2, help="SUPERVISOR_STALL_TIMEOUT")
    parser.add_argument("--vllm", default=str(ROOT / "scripts" / "fake_vllm"))
    parser.add_argument("--model", default="soak")
    parser.add_argument("--served-as", help="the name that clients use, where it is not the model's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", help="where the supervisor's log goes in the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        if not asyncio.run(soak(arguments, Path(folder))):
            sys.exit("soak: not every request is accounted for, or something is left behind")


if __name__ == "__main__":
    main()
