"""The fenced blocks of README.md and docs, for tests that run them as they stand: a changed page is a changed test.

    for command in TRY.commands():
        ...

Each block of README.md and of the pages on RunPod's queue is named below. `tests/queue/test_pages.py` fails for one
that is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from tests.harness import ROOT


class Block(NamedTuple):
    """One fenced block, named by its page and by a text in it."""

    page: str  # its path from the repository's root
    mark: str  # text that it alone of its page's blocks has

    def text(self) -> str:
        """Returns what stands in the block; raises ValueError unless its mark fits one block alone."""
        (found,) = [text for text in blocks(self.page) if self.mark in text]
        return found

    def commands(self) -> list[str]:
        """Returns the commands that a person pastes, one after the other; one may go over several lines."""
        return [line for line in re.split(r"(?<!\\)\n", self.text()) if line.strip()]


# tests/engine/test_readme.py runs these two; tests/vllm/test_pages.py runs TRY as well.
TRY = Block("README.md", '"model": "demo"')
OWN_VLLM = Block("README.md", "SUPERVISOR_VLLM=scripts/fake_vllm")
DOCKER = Block("README.md", "docker build")  # tests/containers/test_image.py runs it
MISTAKE = Block("README.md", "MAX_MODEL_LENGTH")  # tests/engine/test_cli.py runs it
# These are run by tests/vllm/test_pages.py, tests/queue/test_pages.py or tests/containers/test_image.py.
QUEUE = Block("README.md", "scripts/up --mode queue")
CONTAINER = Block("docs/queue.md", "docker exec")
SIMULATOR = Block("docs/development/simulator.md", "-m supervisor.local_runpod.simulator")
FAKE_RUNPOD = Block("docs/development/simulator.md", "python scripts/fake_runpod")
WORKER = Block("docs/development/simulator.md", "export RUNPOD_")
CLIENT = Block("docs/development/simulator.md", "curl -N")
FAULTS = Block("docs/development/simulator.md", "curl -X DELETE")
# These need RunPod's cloud, an endpoint and a key. They are run with addresses of ours in place of RunPod's.
QUEUE_IN_THE_CLOUD = Block("docs/runpod.md", "https://api.runpod.ai/v2/$ENDPOINT")
BALANCER_IN_THE_CLOUD = Block("docs/runpod.md", "https://$ENDPOINT.api.runpod.ai")
# This one holds no commands.
PICTURE = Block("docs/queue.md", "RunPod ◄──")

NAMED_BLOCKS = (
    TRY, OWN_VLLM, DOCKER, MISTAKE, QUEUE, CONTAINER, SIMULATOR, FAKE_RUNPOD, WORKER, CLIENT, FAULTS,
    QUEUE_IN_THE_CLOUD, BALANCER_IN_THE_CLOUD, PICTURE,
)  # fmt: skip
# All blocks of these pages are named.
PAGES = ("README.md", "docs/queue.md", "docs/runpod.md", "docs/development/simulator.md")


def blocks(page: str) -> list[str]:
    """Returns what stands in each fenced block of a page, without the fences."""
    return re.findall(r"^```\w*\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


# The examples of docs/jobs.md: inputs of jobs, and their results


def examples() -> list[tuple[str, str]]:
    """Returns the input of each example, as JSON, and what the page shows of its result."""
    found = []
    for block in blocks("docs/jobs.md"):
        for example in block.strip().split("\n\n"):
            text = " ".join(example.split())  # a line may end within a string
            _, end = json.JSONDecoder().raw_decode(text)
            found.append((text[:end], text[end:].strip()))
    return found


ELIDED = "..."


def read_shown(text: str) -> object:
    """Parses JSON as the page shows it, in which `...` stands for more elements, more members, or more of a string."""
    brackets: list[str] = []

    def read(token: re.Match[str]) -> str:
        word = token[0]
        if word in "[{":
            brackets.append(word)
        elif word in "]}":
            brackets.pop()
        elif word == ELIDED:
            return f'"{ELIDED}": null' if brackets[-1] == "{" else f'"{ELIDED}"'
        return word

    return json.loads(re.sub(r'"(?:[^"\\]|\\.)*"|\.\.\.|[][{}]', read, text))


def differences(page: object, found: object, where: str = "result") -> Iterator[str]:
    """Yields a sentence for each thing that the page shows and `found` has otherwise.

    `page` is what `read_shown` returned, and `where` the place that is compared. Nothing may be missing, and nothing
    more be there without a `...`.
    """
    if isinstance(page, dict) and isinstance(found, dict):
        names = page.keys() - {ELIDED}
        for name in sorted(names - found.keys() if ELIDED in page else names ^ found.keys()):
            yield f"{where}: `{name}` is on one side alone"
        for name in names & found.keys():
            yield from differences(page[name], found[name], f"{where}.{name}")
    elif isinstance(page, list) and isinstance(found, list):
        if ELIDED in page:
            at = page.index(ELIDED)
            found = [*found[:at], ELIDED, *found[max(at, len(found) - (len(page) - at - 1)) :]]
        if len(page) != len(found):
            yield f"{where}: {len(found)} elements, not {len(page)}"
        else:
            for at, pair in enumerate(zip(page, found, strict=True)):
                yield from differences(*pair, f"{where}[{at}]")
    elif isinstance(page, str) and isinstance(found, str):
        if not re.fullmatch(".*".join(map(re.escape, page.split(ELIDED))), found, re.DOTALL):
            yield f"{where}: {found!r}, not {page!r}"
    elif (type(page), page) != (type(found), found):
        yield f"{where}: {found!r}, not {page!r}"
