"""The arrows between the rooms (docs/development/architecture.md): down only, no circle; imports in functions, too."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "supervisor"
MODULES = {
    ".".join(("supervisor", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}

# What each room, and each file beside the rooms, may import of the package.
ARROWS = {
    "around": "around bounded engine lines listen logs secrets settings terminal vllm weights",
    "asking": "listen",
    "bounded": "",
    "doctor": "doctor around asking bounded engine listen repositories secrets settings status vllm weights",
    "engine": "engine bounded lines output settings",
    "explain": "secrets settings",
    "fetch": "engine repositories settings",
    "gateway": "gateway lines",
    "kept": "bounded engine",
    "launch": "engine lines output repositories settings terminal weights",
    "lines": "",
    "listen": "settings",
    "local_runpod": "local_runpod asking kept secrets status",
    "logs": "lines output",
    "output": "",
    "packages": "settings",
    "queue": "queue kept secrets",
    "repositories": "settings vllm weights",
    "secrets": "",
    "settings": "settings bounded secrets vllm",
    "status": "asking engine secrets settings vllm",
    "terminal": "output",
    "vllm": "vllm bounded",
    "weights": "weights",
}
# Those that wire the rooms together, and the verbs of the command.
ABOVE = {"cli", "up", "serve", "explain", "fetch", "status", "doctor", "__main__"}
# In lines of Python: scripts/lines prints them.
LONGEST_FILE, ALL_OF_IT = 400, 16_847


@cache
def nodes_of(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(MODULES[module].read_text())))


@cache
def imported(module: str) -> set[str]:
    """The package's modules that it imports, by their full names."""
    return _imports(nodes_of(module))


@cache
def imported_for_types(module: str) -> set[str]:
    """Those that it names under TYPE_CHECKING and does not import when it runs."""
    nodes = nodes_of(module)
    guarded = {
        inner
        for node in nodes
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    return _imports(guarded) - _imports(node for node in nodes if node not in guarded)


def _imports(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    return {name for name in found if name in MODULES}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_seen() -> None:
    assert len(MODULES) > 60
    assert {"supervisor.engine.child", "supervisor.engine.run"} <= imported("supervisor.engine.engine")


def test_every_room_has_its_arrows() -> None:
    assert {room(module) for module in MODULES} - {"cli", "up", "serve", "__main__"} == ARROWS.keys()


@pytest.mark.parametrize("name", ARROWS)
def test_arrows_point_down(name: str) -> None:
    for module in (module for module in MODULES if room(module) == name):
        assert {room(other) for other in imported(module)} <= {*ARROWS[name].split()}, module


def test_what_is_around_is_known_to_no_room() -> None:
    for module in MODULES:
        if room(module) not in {"around", *ABOVE}:
            assert not {other for other in imported(module) if room(other) == "around"}, module


def test_the_gateway_knows_the_engine_by_a_protocol_of_its_own() -> None:
    for module in (module for module in MODULES if room(module) == "gateway"):
        assert not {other for other in imported(module) if room(other) in {"engine", "launch"}}, module


def test_the_core_knows_no_runpod_on_a_laptop() -> None:
    for module in MODULES:
        if room(module) not in {"local_runpod", *ABOVE}:
            assert not {other for other in imported(module) if room(other) == "local_runpod"}, module


def test_of_the_queue_only_the_child_knows_more_than_http() -> None:
    """It keeps a process alive, by the one seam to the engine room's tools for that."""
    beyond = {
        (module, other)
        for module in MODULES
        if room(module) == "queue"
        for other in imported(module)
        if room(other) != "queue"
    }
    assert {module for module, _ in beyond} == {"supervisor.queue.child"}
    assert {other for _, other in beyond} == {"supervisor.kept", "supervisor.secrets"}


@pytest.mark.parametrize(
    ("name", "most"), [("queue", 1_200), ("local_runpod", 900), ("weights", 676), ("doctor", 650), ("settings", 1_600)]
)
def test_a_room_does_not_grow(name: str, most: int) -> None:
    files = {module: len(path.read_text().splitlines()) for module, path in MODULES.items() if room(module) == name}
    assert sum(files.values()) <= most


def test_no_file_and_not_the_whole_grows() -> None:
    files = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in files.items() if lines > LONGEST_FILE} == {}
    assert sum(files.values()) <= ALL_OF_IT


def test_what_prints_the_sizes_counts_the_same() -> None:
    printed = subprocess.run([PACKAGE.parent / "scripts/lines"], capture_output=True, text=True, check=True).stdout
    rows = {line[:16].strip(): line[16:].replace(",", "").split() for line in printed.splitlines()}
    count = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert int(rows["all"][0]) == count > int(rows["all"][1]) > int(rows["core"][1])


def test_there_is_no_circle() -> None:
    """Imports for types alone are the gateway's only (FOR_TYPES), and they run nothing."""
    left = {module: imported(module) - imported_for_types(module) for module in MODULES}
    while ends := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in ends}
    assert not left, "these import each other"


# Within the gateway's room

# Each file may import those above it in this list, and none below: bytes go up to vLLM by calls, and come back by
# callbacks that the file nearer to vLLM declares itself. Files of one line know nothing of each other, but where they
# stand in FIRST.
FLOORS = (
    "errors heads",
    "http1",
    "policy endings frames counts record",
    "upstream",
    "ask",
    "gate",
    "door",
    "delivery",
    "exchange",
    "reader",
    "client",
    "cache",
    "page metrics access tracing",
    "app",
    "server",
)
FIRST = {("record", "policy"), ("policy", "counts"), ("endings", "frames"), ("tracing", "access")}
# An import for types alone runs nothing, and so makes no circle; but it is knowledge all the same. Those that look down
# the list are few, and each says why.
FOR_TYPES = {
    ("http1", "policy"): "what is decided of a head is kept with it, and http1 does not look into it",
    ("counts", "record"): "a watcher is told of records",
    ("record", "door"): "what is told of a request is, in part, where it came in and how it is on its way",
    ("door", "exchange"): "what comes in by it are exchanges: it holds them, and judges their heads",
    ("reader", "client"): "a client's connection is a reader, and what all connections have in common stands there",
}
GATEWAY = {module.split(".")[2]: module for module in MODULES if room(module) == "gateway"}
LONGEST_ROOM = 2_900  # lines


def within(modules: set[str]) -> set[str]:
    return {module.split(".")[2] for module in modules if room(module) == "gateway"}


def floor(file: str) -> int:
    return next(number for number, files in enumerate(FLOORS) if file in files.split())


def knows(file: str, other: str) -> bool:
    return floor(other) < floor(file) or (file, other) in FIRST


def test_every_file_of_the_gateway_has_its_floor() -> None:
    assert sorted(GATEWAY) == sorted(" ".join(FLOORS).split())


@pytest.mark.parametrize("file", sorted(GATEWAY))
def test_a_file_of_the_gateway_knows_only_those_nearer_to_vllm(file: str) -> None:
    types = within(imported_for_types(GATEWAY[file]))
    for other in within(imported(GATEWAY[file])):
        allowed = knows(file, other) or (other in types and (file, other) in FOR_TYPES)
        assert allowed, f"{file} imports {other}"


def test_no_exception_is_left_over() -> None:
    found = {
        (file, other) for file in GATEWAY for other in within(imported(GATEWAY[file])) if floor(other) == floor(file)
    }
    types = {(file, other) for file in GATEWAY for other in within(imported_for_types(GATEWAY[file]))}
    assert found - set(FOR_TYPES) == FIRST
    assert set(FOR_TYPES) == {pair for pair in types if not knows(*pair)}


@pytest.mark.parametrize("file", sorted(GATEWAY))
def test_the_gateway_imports_of_the_package_only_lines_and_the_version(file: str) -> None:
    others = {other for other in imported(GATEWAY[file]) if room(other) != "gateway"}
    assert others <= {"supervisor.lines"}
    for node in ast.walk(ast.parse(MODULES[GATEWAY[file]].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "supervisor":
            assert {name.name for name in node.names} == {"__version__"}


@pytest.mark.xfail(strict=True, reason="the room is larger than an afternoon's reading")
def test_the_gateway_is_read_in_an_afternoon() -> None:
    assert sum(len(MODULES[module].read_text().splitlines()) for module in GATEWAY.values()) <= LONGEST_ROOM
