"""The arrows between the rooms (docs/architecture.md): down only, without a circle; imports inside functions, too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "supervisor"
MODULES = {
    ".".join(("supervisor", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}

# What each room may import of the package. Rooms that have not been looked at yet are not here.
ARROWS = {
    "engine": {"engine", "bounded", "lines", "output", "settings"},
    "launch": {"engine", "lines", "output", "settings", "terminal", "weights"},
    "bounded": set(),
    "listen": {"settings"},
    # Whatever hangs on the core from outside knows the core; it is handed to it by `serve`.
    "around": {"around", "bounded", "engine", "lines", "listen", "logs", "settings", "terminal", "weights"},
}
# Those that wire the rooms together, and the verbs of the command.
ABOVE = {"cli", "up", "serve", "fetch", "status", "job", "doctor", "__main__"}


def imported(module: str) -> set[str]:
    """The package's modules that it imports, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
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


@pytest.mark.parametrize("name", ARROWS)
def test_arrows_point_down(name: str) -> None:
    for module in (module for module in MODULES if room(module) == name):
        assert {room(other) for other in imported(module)} <= ARROWS[name], module


def test_what_is_around_is_known_to_no_room() -> None:
    for module in MODULES:
        if room(module) not in {"around", *ABOVE}:
            assert not {other for other in imported(module) if room(other) == "around"}, module


def test_the_gateway_knows_the_engine_by_a_protocol_of_its_own() -> None:
    for module in (module for module in MODULES if room(module) == "gateway"):
        assert not {other for other in imported(module) if room(other) in {"engine", "launch"}}, module


@pytest.mark.parametrize("name", ["engine", "around"])
def test_there_is_no_circle(name: str) -> None:
    left = {module: {other for other in imported(module) if room(other) == name}
            for module in MODULES if room(module) == name}  # fmt: skip
    while ends := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in ends}
    assert not left, "these import each other"
