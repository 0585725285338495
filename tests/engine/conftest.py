"""Supervisors over the fake vLLM that many tests share, and the `supervisor` command without a process."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import pytest

from supervisor import cli
from tests.harness import Supervisor, clean_environment

Call = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """A supervisor that serves, for tests that leave it as they found it; the only one in its temporary folder."""
    with Supervisor("some/model", environ={"TMPDIR": str(tmp_path_factory.mktemp("running"))}) as supervisor:
        yield supervisor.ready()


@pytest.fixture(scope="session")
def starting() -> Iterator[Supervisor]:
    """A supervisor whose vLLM loads for longer than any test takes, and which holds requests for 0.3 s."""
    environ = {"SUPERVISOR_HOLD_TIMEOUT": "0.3"}
    with Supervisor("m", plan=[{"load_seconds": 600}], environ=environ) as supervisor:
        supervisor.says("loading weights")
        yield supervisor


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Returns a function that runs `supervisor ARGUMENTS` in this process, for a tenth of what a process costs.

    done = call("explain", cwd=tmp_path, MODEL="m")
    assert done.returncode == 0, done.stderr
    """

    def call(*arguments: str, cwd: Path, given: str = "", **environ: str) -> CompletedProcess[str]:
        """Returns exit code and output. It reads `given` from stdin; `environ` is added to a clean environment."""
        capsys.readouterr()
        at_interrupt = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch, mock.patch.dict(os.environ, clean_environment(**environ), clear=True):
            patch.chdir(cwd)
            patch.setattr("sys.stdin", io.StringIO(given))
            try:
                with pytest.raises(SystemExit) as left:
                    cli.main(list(arguments))
            finally:
                signal.signal(signal.SIGINT, at_interrupt)
        said = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return CompletedProcess(arguments, left.value.code, said.out, said.err)

    return call
