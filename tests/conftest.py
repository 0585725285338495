"""The order of the tests, by which several processes share them (scripts/test).

xdist cuts the list of tests into equal pieces, one for each process, and lets a process that is done take tests off the
ends of others' pieces. As collected, a few pieces would have all of the slow tests. So each piece begins with its share
of those, and is filled up with quick ones. Tests that share a supervisor stay together, because each process would
start one of its own.

The tests of tests/vllm are distributed in another way, because they share one vLLM (`--dist loadscope`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from supervisor.settings import platform

# What is collected stays until the end, so nobody need look for garbage in it: neither while it is collected, which
# would cost a twelfth of that time, nor in each test.
gc.disable()

# Whichever machine this is, the settings' and the doctor's tests are of one without a GPU, but for their own stand-ins.
platform.DEVICES = Path("/nowhere")

# About how many seconds each test in these files takes; where its tests share something, SECONDS_PER_GROUP goes before.
SECONDS_PER_TEST = {
    "tests/queue/test_worker.py": 5.0,
    "tests/engine/test_faults.py": 2.0,
    "tests/engine/test_engine.py": 2.0,
    "tests/engine/test_page.py": 0.5,  # a few that take 2.0, and many that start nothing
    "tests/engine/test_ranks.py": 3.0,
    "tests/engine/test_status.py": 0.5,
    "tests/engine/test_metrics.py": 1.0,
    "tests/engine/test_postmortem.py": 0.5,
    "tests/engine/test_hang.py": 10.0,
    "tests/engine/test_hangs.py": 3.0,
    "tests/engine/test_strangers.py": 1.5,
}
# About how many seconds all tests take that share a fixture, by its name, or a file: so one process alone compiles the
# table of causes.
SECONDS_PER_GROUP = {
    "tests/unit/test_diagnosis.py": 6.0,
    "clients": 60.0,
    "cloud": 3.0,
    "endpoint": 35.0,
    "hub": 5.0,
    "bench": 15.0,
    "mortal": 8.0,
    "plain": 12.0,
    "running": 10.0,
    "impatient": 4.0,
    "queue": 6.0,
    "caching": 7.0,
    "supervisor": 6.0,
    "counted": 4.0,
    "starting": 3.0,
    "gateway": 4.0,
    "guarded": 3.0,
    "told": 3.0,
}


# The files of tests/vllm that don't use the vLLM that the others share: they wait most of the time, or start their own.
WITHOUT_SHARED_VLLM = {
    f"tests/vllm/test_{name}.py"
    for name in ("catalogue", "demo_model", "download", "every_option", "first_prompt", "hang", "templates")
}


class TwoProcesses(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Schedules tests/vllm: one process runs all tests of the shared vLLM, in their order; another all other tests."""

    def _split_scope(self, nodeid: str) -> str:
        return "beside" if nodeid.partition("::")[0] in WITHOUT_SHARED_VLLM else "shared"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling | None:
    return TwoProcesses(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    if count > 1 and not any(item.get_closest_marker("vllm") for item in items):
        items[:] = deal(items, count)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignores a file that holds slow tests alone, where slow tests are left out: it is not even imported."""
    if "not slow" in config.getoption("markexpr") and collection_path.suffix == ".py":
        return True if "\npytestmark = pytest.mark.slow" in collection_path.read_text() else None
    return None


def pytest_collection_finish() -> None:
    """Turns the garbage collector on again, for what the tests make themselves."""
    gc.freeze()
    gc.enable()


def deal(items: Iterable[pytest.Item], count: int) -> list[pytest.Item]:
    """Returns the tests in an order that xdist cuts into `count` pieces of about the same time."""
    groups: dict[str, tuple[float, list[pytest.Item]]] = {}
    quick: list[pytest.Item] = []
    for item in items:
        file = item.nodeid.partition("::")[0]
        shared = next((name for name in SECONDS_PER_GROUP if name in (file, *getattr(item, "fixturenames", ()))), None)
        seconds = SECONDS_PER_TEST.get(file)
        if shared is not None:
            groups.setdefault(shared, (SECONDS_PER_GROUP[shared], []))[1].append(item)
        elif seconds is not None:
            groups[item.nodeid] = (seconds, [item])
        else:
            quick.append(item)
    piles: list[tuple[float, list[pytest.Item]]] = [(0.0, []) for _ in range(count)]
    for seconds, group in sorted(groups.values(), key=lambda group: -group[0]):
        at = min(range(count), key=lambda at: piles[at][0])
        piles[at] = (piles[at][0] + seconds, piles[at][1] + group)
    # xdist deals in the same way: each process gets an equal share of what is left.
    remaining = sum(len(pile) for _, pile in piles) + len(quick)
    found = []
    for at, (_, pile) in enumerate(sorted(piles, key=lambda pile: -len(pile[1]))):
        share = remaining // (count - at)
        filled = pile + [quick.pop() for _ in range(min(len(quick), max(0, share - len(pile))))]
        remaining -= share
        found += filled
    return found + quick
