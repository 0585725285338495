"""Every route of vLLM has been looked at: it is open to whoever has a key, or an admin's.

`routes.json` says of each route when it is there and what it does. A route that is in no list fails these tests, so a
new vLLM can't bring one that nobody has judged.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from supervisor.gateway import policy
from tests.vllm.conftest import VLLM

pytestmark = pytest.mark.vllm

HERE = Path(__file__).parent
KINDS = {"inference", "read-only", "admin"}
TABLE = {row["path"]: row for row in json.loads((HERE / "routes.json").read_text())}


@pytest.fixture(scope="module")
def routes() -> dict[str, list[str]]:
    """The methods of each path that the installed vLLM can have, with whatever it is started."""
    command = [VLLM.parent / "python", HERE / "list_routes.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {row["path"]: row["methods"] for row in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def running(direct: httpx.Client) -> set[str]:
    """What the vLLM that runs says of itself."""
    return set(direct.get("/openapi.json").json()["paths"])


@pytest.fixture(scope="module")
def version(direct: httpx.Client) -> tuple[int, ...]:
    return minor(direct.get("/version").json()["version"])


def minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def covers(prefixes: tuple[str, ...], path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def is_of(row: dict[str, Any], version: tuple[int, ...]) -> bool:
    first, _, last = row["versions"].partition("-")
    return minor(first) <= version <= minor(last or first)


def test_the_table_is_well_formed() -> None:
    for path, row in TABLE.items():
        assert row.keys() == {"path", "methods", "when", "kind", "why", "versions"}, path
        assert row["kind"] in KINDS, path


def test_every_route_is_in_the_table(routes: dict[str, list[str]], running: set[str]) -> None:
    new = sorted((routes.keys() | running) - TABLE.keys())
    assert not new, "vLLM has routes that nobody has judged: see tests/vllm/routes.json and gateway/routes.toml"


def test_the_table_has_nothing_that_vllm_lacks(routes: dict[str, list[str]], version: tuple[int, ...]) -> None:
    """Which also tells that the listing is whole: it finds each route that is known."""
    known = {path: row for path, row in TABLE.items() if is_of(row, version)}
    assert routes.keys() == known.keys()
    differing = {path for path, methods in routes.items() if set(methods) - set(known[path]["methods"])}
    assert not differing, {path: routes[path] for path in differing}


def test_the_running_vllm_has_no_route_that_the_listing_lacks(routes: dict[str, list[str]], running: set[str]) -> None:
    assert running <= routes.keys()


def test_every_route_is_open_or_an_admins(routes: dict[str, list[str]], running: set[str]) -> None:
    for path in sorted({*routes, *running, *TABLE}):
        found = (covers(policy.OPEN_ROUTES, path), covers(policy.ADMIN_ROUTES, path))
        assert found in ((True, False), (False, True)), f"{path}: open {found[0]}, an admin's {found[1]}"


@pytest.mark.parametrize("path", TABLE)
def test_the_policy_is_that_of_the_table(path: str) -> None:
    """The table comes from vLLM's source, the policy is what the gateway does."""
    assert covers(policy.ADMIN_ROUTES, path) == (TABLE[path]["kind"] == "admin"), TABLE[path]["why"]


def test_no_prefix_is_for_nothing() -> None:
    for prefix in (*policy.OPEN_ROUTES, *policy.ADMIN_ROUTES):
        assert any(covers((prefix,), path) for path in TABLE), prefix
