"""Clients as a user has them, each in the program of its language (with_python.py, with_npm.mjs) or, where packages
can't live with the others, in one of theirs (with_langchain.py).

    clients.ask(OPENAI, served, "streamed").text

A program is started once for all tests of a process: to import what it has takes longer than to ask.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, Supervisor, clean_environment

HERE = Path(__file__).parent
# The folder that scripts/setup_clients fills, and the command, which is given from ROOT.
PROGRAMS: dict[str, tuple[Path, Sequence[str | Path]]] = {
    "python": (ROOT / ".clients", (ROOT / ".clients" / "bin" / "python", "-m", "tests.clients.with_python")),
    "langchain": (
        ROOT / ".clients-langchain",
        (ROOT / ".clients-langchain" / "bin" / "python", "-m", "tests.clients.with_langchain"),
    ),
    "npm": (HERE / "node_modules", ("node", HERE / "with_npm.mjs")),
}
PROMPT, MODEL, TOKENS = "Who are you, and what is it that you do?", "some/model", 12
PATIENCE = 30.0


@dataclass(frozen=True)
class Client:
    """`base`: what a user appends to the server's address for it; `whats`: what it can do."""

    name: str
    program: str
    client: str
    base: str = "/v1"
    whats: tuple[str, ...] = ("whole", "streamed")

    def __str__(self) -> str:
        return self.name


OPENAI = Client("openai from Python", "python", "openai", whats=("whole", "streamed", "responses"))
AZURE = Client("AzureOpenAI", "python", "azure", whats=("responses",))
ANTHROPIC = Client("anthropic from Python", "python", "anthropic", base="", whats=("whole", "streamed", "tokens"))
LANGCHAIN = Client("langchain-openai", "python", "langchain", whats=("whole", "streamed", "responses"))
LITELLM = Client("litellm", "python", "litellm")
HOSTED_VLLM = Client("litellm's hosted_vllm", "python", "hosted_vllm")
OPENAI_NPM = Client("openai from npm", "npm", "openai", whats=("whole", "streamed", "responses"))
ANTHROPIC_NPM = Client("@anthropic-ai/sdk", "npm", "anthropic", base="", whats=("whole", "streamed", "tokens"))
AI = Client("ai", "npm", "ai")
BROWSER = Client("openai in a browser", "npm", "browser")
PAGE = Client("a page", "npm", "page", base="", whats=("look",))
# Of RunPod's queue: `base` is what stands before the endpoint's id.
CHAT_RUNPOD = Client("ChatRunPod", "langchain", "chat", base="/v2", whats=("whole", "streamed", "counted"))
RUNPOD_LLM = Client("LangChain's RunPod", "langchain", "llm", base="/v2")
RUNPOD_CHAT_MODEL = Client("RunPodChatModel", "langchain", "another_chat", base="/v2")
CLIENTS = (OPENAI, ANTHROPIC, LANGCHAIN, LITELLM, HOSTED_VLLM, OPENAI_NPM, ANTHROPIC_NPM, AI)


@dataclass(frozen=True)
class Error:
    """What it raised: the names of its class and those above it, what it knows of the answer."""

    names: Sequence[str]
    status: int | None
    message: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Told:
    """What a client made of an answer. `log`: the requests of one in a browser."""

    pieces: list[str]
    error: Error | None
    log: list[str]

    @property
    def text(self) -> str:
        assert self.error is None, self.error
        return "".join(self.pieces)


@dataclass
class Asking:
    """A request under way."""

    first: Future[str] = field(default_factory=Future)
    end: Future[Told] = field(default_factory=Future)

    def told(self) -> Told:
        return self.end.result(PATIENCE)


class Program:
    def __init__(self, command: Sequence[str | Path]) -> None:
        # litellm would read a list of prices from the network.
        environ = clean_environment(LITELLM_LOCAL_MODEL_COST_MAP="True")
        self.process = subprocess.Popen(
            [*map(str, command)], env=environ, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=1,
        )  # fmt: skip
        self.asked: dict[int, Asking] = {}
        self.ids = itertools.count()
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline()) == {"ready": True}
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            content = json.loads(line)
            asking = self.asked[content["id"]]
            if "piece" in content:
                if not asking.first.done():
                    asking.first.set_result(content["piece"])
                continue
            error = Error(**content["error"]) if content["error"] else None
            asking.end.set_result(Told(content["pieces"], error, content.get("log") or []))
        for asking in self.asked.values():
            if not asking.end.done():
                asking.end.set_exception(RuntimeError("the clients' program has ended"))

    def begin(self, content: dict[str, Any]) -> Asking:
        assert self.process.stdin is not None
        number = next(self.ids)
        asking = self.asked[number] = Asking()
        self.process.stdin.write(json.dumps({"id": number, **content}) + "\n")
        self.process.stdin.flush()
        return asking

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join(10)


class Clients:
    def __init__(self) -> None:
        self.programs: dict[str, Program] = {}

    def begin(
        self, client: Client, served: Supervisor | int, do: str = "whole", *, base: str | None = None,
        fake: object = None, headers: dict[str, str] | None = None, tokens: int = TOKENS, key: str = "none",
        **more: object,
    ) -> Asking:  # fmt: skip
        """Asks, and does not wait. `base` stands for its own; `fake` is a plan for this request."""
        if client.program not in self.programs:
            self.programs[client.program] = Program(command(client.program))
        port = served if isinstance(served, int) else served.port
        given = {**(headers or {}), **({"X-Fake": json.dumps(fake)} if fake is not None else {})}
        content = {
            "client": client.client, "do": do, "url": f"http://127.0.0.1:{port}{client.base if base is None else base}",
            "key": key, "headers": given, "tokens": tokens, "prompt": PROMPT, "model": MODEL, **more,
        }  # fmt: skip
        return self.programs[client.program].begin(content)

    def ask(self, client: Client, served: Supervisor | int, do: str = "whole", **more: Any) -> Told:
        return self.begin(client, served, do, **more).told()

    def stop(self) -> None:
        for program in self.programs.values():
            program.stop()


def command(program: str) -> Sequence[str | Path]:
    """Without the packages the tests are skipped, loudly; where nobody has tried to install them, CI fails."""
    folder, found = PROGRAMS[program]
    if (folder / ".stamp").exists():
        return found
    missing = folder / ".missing"
    if missing.exists():
        pytest.skip(f"the clients of {program} can't be had here: {missing.read_text().strip()}")
    text = f"the clients of {program} are not here: scripts/setup_clients"
    if "CI" in os.environ:
        pytest.fail(text)
    pytest.skip(text)
