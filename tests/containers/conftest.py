"""The image, built by scripts/container_rig, and containers of it.

Where this machine can't run containers, every test here is skipped, and the summary says so in a line of its own.
With CI=true that is a failure, unless the tools for it can't even be installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import DEMO, ROOT, Supervisor, clean_environment

RIG = ROOT / "scripts" / "container_rig"
IMAGE = "vllm-supervisor"
MODEL = "/models/demo"
START = 400.0  # seconds that the real vLLM may take; 30 to 60 on two cores
NOT_INSTALLABLE, NOT_STARTABLE = 77, 78  # the rig's exit codes

_impossible: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the other tests run while the real vLLM loads; those that use it come last, in the order of their file."""
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.timeout(START + 200))
    rest = [item for item in items if item not in ours]
    items[:] = [*rest, *sorted(ours, key=lambda item: "served" in getattr(item, "fixturenames", ()))]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reason in _impossible:
        terminalreporter.write_sep("!", "THE IMAGE WAS NOT TESTED", red=True, bold=True)
        terminalreporter.write_line(f"SKIPPED: all tests of the image: {reason}", red=True, bold=True)


def rig(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs scripts/container_rig, for ten minutes at most, and returns its exit code and output."""
    return subprocess.run(
        [str(RIG), *map(str, arguments)],
        env=clean_environment(**environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def podman(*arguments: str | Path) -> str:
    """Runs podman, which must succeed, and returns what it prints."""
    done = rig("podman", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def image() -> str:
    """The image's name, once it is built; skips the tests where that is impossible."""
    assert (ROOT / ".vllm" / "bin" / "vllm").exists(), (
        "the real vLLM is missing: run scripts/setup, or leave these tests out with scripts/test --quick"
    )
    done = rig("build")
    if done.returncode in (NOT_INSTALLABLE, NOT_STARTABLE):
        reason = done.stderr.strip().splitlines()[-1]
        _impossible.append(reason)
        if os.environ.get("CI") == "true" and done.returncode == NOT_STARTABLE:
            pytest.fail(reason)
        pytest.skip(reason)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return IMAGE


class Container(Supervisor):
    """A container of the image, run in the foreground with the host's network; removed by force with the block.

    The gateway listens on a free port of 127.0.0.1, and all of `Supervisor` works but `engine`.
    """

    def __init__(
        self, *arguments: str, fake: bool = True, options: tuple[str, ...] = (), environ: dict[str, str] | None = None,
        plan: object = None, image: str = IMAGE,
    ) -> None:  # fmt: skip
        """Runs `arguments` in it. With `fake`, vLLM is scripts/fake_vllm, and `plan` is for it. `options` are podman's.

        A variable that is empty in `environ` is as the image has it.
        """
        self.name = f"rig-{uuid.uuid4().hex[:12]}"
        given = {"PORT": "0", "SUPERVISOR_HOST": "127.0.0.1", "SUPERVISOR_LOG_FORMAT": "text", "MODEL": MODEL}
        options = ("--name", self.name, f"--volume={DEMO}:{MODEL}:ro", *options)
        if fake:
            given |= {"SUPERVISOR_VLLM": "/rig/fake_vllm", "SUPERVISOR_ALLOW_ROUTES": "/fake"}
            options += (f"--volume={ROOT / 'scripts'}:/rig:ro",)
        if plan is not None:
            given["FAKE_VLLM_PLAN"] = json.dumps(plan)
        set_up = [f"--env={name}={value}" for name, value in (given | (environ or {})).items() if value]
        super().__init__(*arguments, program=(RIG, "run", *options, *set_up, image), vllm=None, verb="")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print(f"the container said:\n{self.output[-5000:]}")
        if self._client is not None:
            self._client.close()
        rig("podman", "rm", "--force", "--time", "0", "--ignore", self.name)
        self.process.kill()
        self.process.wait()

    def engine(self) -> int:
        raise NotImplementedError("a process of a container has another number here")

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.client.get("/status").json())

    def inside(self, *command: str) -> str:
        return podman("exec", self.name, *command)

    def healthy(self) -> bool:
        """What the image's HEALTHCHECK says."""
        done = rig("podman", "healthcheck", "run", self.name)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode == 0

    def stop(self, seconds: int = 20) -> None:
        """`docker stop`."""
        podman("stop", "--time", str(seconds), self.name)


def ran(*arguments: str, **more: Any) -> tuple[int, str]:
    """Runs a container that ends by itself, in 60 s at most, and returns its exit code and output."""
    with Container(*arguments, **more) as container:
        return container.exit_code(60), container.output


def volume(name: str) -> Path:
    """Returns a folder that stays from run to run: what vLLM learns of a model's class costs it 20 s."""
    folder = ROOT / ".containers" / name
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def loading(image: str) -> Iterator[Container]:
    """A container of the real vLLM, with the bundled model and a volume for its cache; it may still load.

    It runs without --ipc=host: killed by `podman rm`, it would leave its shared memory on the host, where no guard is
    alive to remove it.
    """
    bundled = podman("run", "--rm", image, "sh", "-c", "echo /opt/supervisor/lib/python3*/site-packages/supervisor")
    environ = {"MODEL": f"{bundled.strip()}/demo/model", "SUPERVISOR_HOLD_TIMEOUT": str(START)}
    options = ("--shm-size=1g", f"--volume={volume('cache')}:/root/.cache/vllm")
    with Container(fake=False, environ=environ, options=options) as container:
        yield container


@pytest.fixture(autouse=True)
def _in_the_background(loading: Container) -> None:
    """Starts the real vLLM with the first test, so that it loads while the tests with the fake run."""


@pytest.fixture(scope="session")
def served(loading: Container) -> Container:
    """The container of the real vLLM, when it serves."""
    loading.ready(START)
    return loading
