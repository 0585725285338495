"""What pyproject.toml says of the package: its version, what it needs, and what its parts may import."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from supervisor import __version__, packages
from supervisor.settings.settings import Arguments, SettingsError, gather

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Programs of their own, which run in vLLM's environment.
VLLMS = {"weights/download.py", "weights/halves.py", "around/zygote.py", "vllm/flags/dump.py"}
# What our code knows the inside of.
INTERNALS = {"httptools", "uvicorn", "runpod"}
# Who may import what an extra brings.
OF_AN_EXTRA = {"runpod": ("queue/", "local_runpod/simulator.py"), "otel": ("gateway/tracing.py",)}


def names(rows: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(row).name) for row in rows}


def imported() -> Iterator[tuple[str, str]]:
    """(file, distribution) for each import of a package that is not Python's own or ours."""
    known = packages_distributions()
    package = ROOT / "supervisor"
    for path in sorted(set(package.rglob("*.py")) - {package / name for name in VLLMS}):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                found = [str(node.module)]
            for module in found:
                top = module.split(".")[0]
                if top not in {*sys.stdlib_module_names, "supervisor"}:
                    (owner, *_) = known.get(".".join(module.split(".")[:2]), known.get(top, [top]))
                    yield str(path.relative_to(package)), canonicalize_name(owner)


def test_the_version_has_one_source() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert version("vllm-supervisor") == __version__


def test_both_names_start_it() -> None:
    assert PROJECT["scripts"] == dict.fromkeys(("supervisor", "vllm-supervisor"), "supervisor.__main__:main")


def test_what_is_imported_is_asked_for() -> None:
    core, extras = names(PROJECT["dependencies"]), {extra: names(EXTRAS[extra]) for extra in OF_AN_EXTRA}
    found = set(imported())
    assert {"httptools", "runpod", "starlette", "rich"} <= {owner for _, owner in found}
    for file, owner in sorted(found):
        its = [extra for extra, places in OF_AN_EXTRA.items() if file.startswith(places)]
        allowed = core.union(*(extras[extra] for extra in its))
        if owner.startswith("opentelemetry"):
            assert "otel" in its, file
        else:
            assert owner in allowed, (file, owner)


def test_the_extra_of_the_queue_is_what_is_looked_for() -> None:
    assert set(packages.RUNPOD_PACKAGES) == names(EXTRAS["runpod"])


def test_whose_inside_is_known_is_pinned() -> None:
    for row in (*PROJECT["dependencies"], *EXTRAS["runpod"]):
        asked = Requirement(row)
        if asked.name in INTERNALS:
            (pin,) = asked.specifier
            assert pin.operator in ("~=", "=="), row
            assert len(pin.version.split(".")) == 3, row


def test_the_lock_fits_every_extra() -> None:
    """`pip check`, which scripts/setup asks, knows nothing of extras."""
    for row in sum(EXTRAS.values(), PROJECT["dependencies"]):
        asked = Requirement(row)
        if asked.name != PROJECT["name"] and (asked.marker is None or asked.marker.evaluate()):
            assert asked.specifier.contains(version(asked.name)), row
    assert names(EXTRAS["all"]) == {PROJECT["name"]}
    assert Requirement(EXTRAS["all"][0]).extras == EXTRAS.keys() - {"all", "dev"}


def test_the_page_of_the_package_has_its_words() -> None:
    said = cast(Message, distribution("vllm-supervisor").metadata)
    assert said["License-Expression"] == "MIT"
    assert str(said.get_payload()).startswith("# vllm-supervisor\n")
    assert {"Homepage", "Changelog", "Issues"} <= PROJECT["urls"].keys()
    for url in PROJECT["urls"].values():
        _, _, path = url.partition("/main/")
        assert (ROOT / path).exists(), url


def test_queue_mode_without_its_extra_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"MODEL": "m", "SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")}
    monkeypatch.setattr(packages, "RUNPOD_PACKAGES", ("aiohttp", "no_such_package"))
    with pytest.raises(SettingsError) as caught:
        packages.check(gather(Arguments(mode="queue"), environ))
    assert caught.value.problems == [
        "queue mode needs no_such_package: install the extra, pip install 'vllm-supervisor[runpod]'"
    ]
    packages.check(gather(Arguments(mode="http"), environ))


def test_a_vllm_in_our_own_environment_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"MODEL": "m", "SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")}
    assert packages.check(gather(Arguments(), environ)).warnings == ()
    monkeypatch.setattr(sys, "prefix", str(folder.parent / "vllm"))
    (told,) = packages.check(gather(Arguments(), environ)).warnings
    assert told.startswith(f"vLLM and the supervisor share one environment ({folder.parent}/vllm). ")


@pytest.mark.parametrize("theirs", ["#\n", None], ids=["installed over ours", "removed with ours"])
def test_the_unrelated_supervisor_over_ours_is_told(tmp_path: Path, theirs: str | None) -> None:
    package = tmp_path / "supervisor"
    package.mkdir()
    for path in (ROOT / "supervisor").iterdir():
        if path.name != "__init__.py":
            (package / path.name).symlink_to(path)
    if theirs is not None:
        (package / "__init__.py").write_text(theirs)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "supervisor", "--version"],
        cwd=tmp_path, env={}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("supervisor: an unrelated package named supervisor (supervisord) was installed over")
    assert len(done.stderr.splitlines()) == 1
