"""The command as a user types it: what bad input is answered with, and what `explain` shows.

Most of it is called in this process (`asked`); what only a process shows is run as one (`run`)."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from supervisor import __version__
from supervisor.cli import main
from supervisor.listen import bind
from supervisor.settings.settings import Arguments, SettingsError, gather
from tests.engine.conftest import Call
from tests.harness import DEMO, FAKE, SUPERVISOR, clean_environment, wait_until
from tests.pages import MISTAKE


def run(*arguments: str, cwd: Path, vllm: str | None = str(FAKE), **environ: str) -> subprocess.CompletedProcess[str]:
    if vllm is not None:
        environ["SUPERVISOR_VLLM"] = vllm
    return subprocess.run(
        [str(SUPERVISOR), *arguments],
        env=clean_environment(**{"PORT": "0"} | environ),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
        check=False,
    )


Asked = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def asked(call: Call, tmp_path: Path) -> Asked:
    """As `run`, with the test's own folder as the working folder."""

    def asked(*arguments: str, vllm: str | None = str(FAKE), **environ: str) -> subprocess.CompletedProcess[str]:
        if vllm is not None:
            environ["SUPERVISOR_VLLM"] = vllm
        return call(*arguments, cwd=tmp_path, **{"PORT": "0"} | environ)

    return asked


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        (["m", "--bogus"], {}, "unrecognized arguments: --bogus"),
        (["m", "n"], {}, "unrecognized arguments: n"),
        (["m", "--max-model-len", "9"], {}, "go behind `--`: supervisor up MODEL -- --max-model-len 9"),
        (["m", "--port"], {}, "argument --port: expected one argument"),
        (["m", "--mode", "nonsense"], {}, "expected one of auto, http, queue"),
        (["/no/such/folder"], {}, "MODEL=/no/such/folder (command line): expected a folder that is there"),
        (["m", "--config", "/no/such.yaml"], {}, "/no/such.yaml can't be read"),
        (["m"], {"MAX_NUM_SEQS": "x"}, "MAX_NUM_SEQS=x (environment MAX_NUM_SEQS): expected a whole number"),
        (["m"], {"vllm": "/no/such/vllm"}, "SUPERVISOR_VLLM=/no/such/vllm: no such command"),
        (["m"], {"vllm": "/bin/false"}, "it is not a working vLLM"),
        (["m", "--", "--uds", "x"], {}, "--uds (command line): can't be passed to vLLM"),
        ([], {"RUNPOD_POD_ID": "x"}, "no model is named: set MODEL"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(
    asked: Asked, arguments: list[str], environ: dict[str, str], expected: str
) -> None:
    verb = "explain" if "--bogus" in arguments else "up"  # both read the settings by the same way
    done = asked(verb, *arguments, **environ)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("supervisor: ")
    assert expected in line


@pytest.mark.parametrize("arguments", [["upp"], [], ["--bogus"]])
def test_unknown_verb(asked: Asked, arguments: list[str]) -> None:
    done = asked(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "supervisor --help" in done.stderr


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version_is_one_line_and_needs_no_verb(asked: Asked, flag: str) -> None:
    done = asked(flag, vllm=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"supervisor {__version__}\n", "")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["explain", DEMO], 0), (["explain", "--x"], 2)])
def test_a_parent_may_have_closed_the_outputs(
    closed: tuple[int, ...], arguments: list[str], code: int, tmp_path: Path
) -> None:
    """As some runners of services do. What is opened next would stand where we write, and be written into."""
    redirected = " ".join(f"{number}>&-" for number in closed)
    script = f"exec {shlex.join(map(str, [SUPERVISOR, *arguments]))} {redirected}"
    done = subprocess.run(
        ["bash", "-c", script], env=clean_environment(SUPERVISOR_VLLM=str(FAKE)), cwd=tmp_path, timeout=30,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert (1 in closed or code == 2) == (done.stdout == "")
    assert (2 in closed or code == 0) == (done.stderr == "")


@pytest.mark.parametrize("verb", ["explain m", "explain m --json", "doctor m", "explain --json --x"])
def test_a_full_disk_where_its_output_goes_is_one_line(verb: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {SUPERVISOR} {verb} >/dev/full"], env=clean_environment(SUPERVISOR_VLLM=str(FAKE)),
        cwd=tmp_path, timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "--x" in verb:
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    else:
        assert (done.returncode, done.stderr) == (
            1,
            "supervisor: its output can't be written: No space left on device\n",
        )


@pytest.mark.parametrize("verb", [["status"], ["job", "{}"]])
@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "supervisor: its output can't be written: No space left on device"), (errno.EPIPE, 1)],
)
def test_who_only_asks_ends_well_where_the_output_is_gone(
    verb: list[str], number: int, code: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `supervisor status | head -1`, which nobody wants to read about. Another error is not taken for that."""
    monkeypatch.setattr("supervisor.cli.query", lambda *_: fails(number))
    with pytest.raises(SystemExit) as end:
        main(verb)
    assert end.value.code == code
    monkeypatch.setattr("supervisor.cli.query", lambda *_: fails(errno.ENOENT))
    with pytest.raises(FileNotFoundError):
        main(verb)


def fails(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_version_imports_nothing_that_is_heavy(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("supervisor: {vllm: /no/such/vllm}\n")  # nor does it read anything
    program = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from supervisor import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "-V"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    version, imported = done.stdout.splitlines()
    assert version == f"supervisor {__version__}"
    assert not {"yaml", "rich", "asyncio", "psutil", "uvicorn", "ssl"} & set(imported.split())


def test_malformed_config_names_file_and_line(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("supervisor:\nbroken: [1\n")
    done = asked("up")
    assert done.returncode == 2
    assert "config.yaml is not valid YAML at line 3" in done.stderr
    assert len(done.stderr.splitlines()) <= 2  # and the model, which the file could not name


PROGRAM = "#!/bin/sh\ntouch ran\necho vllm 0.32.0\n"


@pytest.mark.parametrize("verb", ["up", "explain", "doctor", "fetch"])
def test_no_verb_runs_what_a_config_yaml_that_nobody_named_names(asked: Asked, tmp_path: Path, verb: str) -> None:
    (tmp_path / "program").write_text(PROGRAM)
    (tmp_path / "program").chmod(0o755)
    (tmp_path / "config.yaml").write_text(f"supervisor: {{vllm: {tmp_path}/program}}\n")
    done = asked(verb, "m", vllm=None)
    assert done.returncode == (1 if verb == "doctor" else 2)
    assert "config.yaml supervisor.vllm is not obeyed" in done.stdout + done.stderr
    assert "set SUPERVISOR_VLLM" in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def test_another_programs_config_yaml_is_passed_over_with_a_warning(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 3}\nmodel: gpt\n")
    done = asked("explain", "m")
    assert done.returncode == 0
    assert "warning: config.yaml in this folder is not read: it has no `supervisor:` section" in done.stdout
    assert shlex.split(done.stdout.splitlines()[-1])[1:3] == ["serve", "m"]


def test_port_in_use_names_the_variable(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("up", "m", "--port", str(taken.getsockname()[1]), cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "set PORT" in done.stderr
    assert "in use" in done.stderr


def test_what_ends_a_start_is_json_where_the_log_is(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 3}\n")
    environ = {"SUPERVISOR_LOG_FORMAT": "json"}
    done = asked("up", "m", "--port", "none", **environ)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert (done.returncode, done.stdout) == (2, "")
    assert [line["level"] for line in lines] == ["ERROR", "WARNING"]
    assert lines[0]["message"].startswith("PORT=none (command line --port): expected a port")
    assert all(line["logger"] == "supervisor" and line["time"].endswith("Z") for line in lines)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (line,) = asked("up", "m", "--port", str(taken.getsockname()[1]), **environ).stderr.splitlines()[-1:]
    assert "set PORT" in json.loads(line)["message"]
    assert asked("explain", "m", "--port", "none", **environ).stderr.startswith("supervisor: PORT=none")


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid", "2001:db8::7"])
def test_an_address_that_is_not_ours(host: str) -> None:
    settings = gather(Arguments(model="m", host=host), clean_environment(SUPERVISOR_VLLM=str(FAKE), PORT="0"))
    with pytest.raises(SettingsError) as caught:
        bind(settings)
    (problem,) = caught.value.problems
    assert "SUPERVISOR_HOST" in problem


def test_missing_vllm_says_what_to_run(tmp_path: Path) -> None:
    """No `.vllm` beside the environment and none on PATH: a bare interpreter runs the package from elsewhere."""
    site = tmp_path / "lib"
    site.mkdir()
    (site / "supervisor").symlink_to(Path(__file__).parents[2] / "supervisor")
    done = subprocess.run(
        [os.path.realpath(os.sys.executable), "-m", "supervisor", "up", "m"],  # type: ignore[attr-defined]
        env={"PYTHONPATH": str(site), "PATH": "/nowhere", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "supervisor: vLLM was not found. Install it into an environment of its own (`uv tool install vllm`, or in a "
        "checkout scripts/setup), and put its `vllm` command on PATH or name it in SUPERVISOR_VLLM."
    ]


def test_a_vllm_that_is_no_program(asked: Asked, tmp_path: Path) -> None:
    broken = tmp_path / "vllm"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    done = asked("up", "m", vllm=str(broken))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_the_readmes_example_of_wrong_settings_is_what_comes_out(tmp_path: Path) -> None:
    command, *said = MISTAKE.text().removeprefix("$ ").splitlines()
    environ = dict(word.split("=") for word in command.split()[:-1])
    assert command.split()[-1] == "scripts/up"
    assert run("up", "m", cwd=tmp_path, **environ).stderr.splitlines() == said


# explain


def test_explain_shows_every_setting_with_its_source(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("supervisor:\nmax_model_len: 4096\n")
    done = asked("explain", "m", MAX_MODEL_LEN="8192", HOST="0.0.0.0", MAX_NUM_SEQS="4")
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "8192" in rows["MAX_MODEL_LEN"]
    assert "environment MAX_MODEL_LEN" in rows["MAX_MODEL_LEN"]
    assert "config.yaml max_model_len: 4096" in rows["MAX_MODEL_LEN"]
    assert "default" in rows["SUPERVISOR_DRAIN_TIMEOUT"]
    assert "warning: environment HOST is not passed to vLLM: set SUPERVISOR_HOST" in done.stdout
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[1:3] == ["serve", "m"]
    assert command[5:] == ["--disable-uvicorn-access-log", "--max-model-len", "8192", "--max-num-seqs", "4"]
    assert "SUPERVISOR_ACCESS_LOG" in rows["DISABLE_UVICORN_ACCESS_LOG"]


def test_explain_on_a_terminal_folds_what_is_long_but_not_the_command(tmp_path: Path) -> None:
    """As a person sees it, 80 columns wide: a table that stays a table, a command that can be pasted."""
    done = subprocess.run(
        ["script", "-qec", f"stty cols 80; {SUPERVISOR} explain some/{'long' * 30} -- --seed 7", "/dev/null"],
        env=clean_environment(SUPERVISOR_VLLM=str(FAKE), TERM="xterm"),
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in done.stdout.replace("\r", "").splitlines()]
    table = lines[: lines.index("")]
    assert max(map(len, table)) <= 80
    assert "\x1b[" in done.stdout
    (command,) = [line for line in lines if " serve " in line]
    assert shlex.split(command)[2] == "some/" + "long" * 30
    assert shlex.split(command)[-2:] == ["--seed", "7"]


def test_explain_of_wrong_settings_tells_all_at_once_and_exits_2(asked: Asked) -> None:
    environ = {"MAX_NUM_SEQS": "x", "DTYPE": "y", "PORT": "z", "MAX_MODEL_LENGTH": "1"}
    done = asked("explain", "m", "--json", **environ)
    assert done.returncode == 2
    content = json.loads(done.stdout)
    assert [problem.partition("=")[0] for problem in content["problems"]] == ["PORT", "DTYPE", "MAX_NUM_SEQS"]
    assert ["did you mean MAX_MODEL_LEN" in warning for warning in content["warnings"]] == [True]
    assert len(done.stderr.splitlines()) == 4


def test_explain_as_json(asked: Asked) -> None:
    content = json.loads(asked("explain", str(DEMO), "--json").stdout)
    settings = {row["name"]: row for row in content["settings"]}
    assert settings["MODEL"]["source"] == "command line"
    assert settings["SERVED_MODEL_NAME"] == {
        "name": "SERVED_MODEL_NAME",
        "value": "demo",
        "source": "demo model",
        "overrode": [],
    }
    assert content["command"].startswith(f"{FAKE} serve {DEMO} --uds ")
    assert content["vllm_version"] == "0.32.0"


# Ctrl-C


def interrupted(tmp_path: Path, *arguments: str, at: str) -> subprocess.CompletedProcess[str]:
    """Runs the command, and sends it SIGINT when it imports the module `at`."""
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        name == {at!r} and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from supervisor.__main__ import main\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=clean_environment(SUPERVISOR_VLLM=str(FAKE), PORT="0"),
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("at", ["supervisor.cli", "argparse", "supervisor.settings.settings", "supervisor.vllm.values"])
@pytest.mark.parametrize("verb", ["up", "explain", "--version"])
def test_ctrl_c_at_the_very_beginning_is_quiet(tmp_path: Path, at: str, verb: str) -> None:
    done = interrupted(tmp_path, verb, at=at)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(("verb", "at"), [("explain", "rich.console"), ("up", "supervisor.up"), ("doctor", "httpx")])
def test_ctrl_c_a_little_later_is_quiet_too(tmp_path: Path, verb: str, at: str) -> None:
    done = interrupted(tmp_path, verb, str(DEMO), at=at)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_takes_along_who_is_asked(tmp_path: Path) -> None:
    """A terminal's reaches all of its group, one of `kill` the supervisor alone."""
    (temporary := tmp_path / "temporary").mkdir()
    asked, vllm = tmp_path / "asked", tmp_path / "program"
    vllm.write_text(f"#!/bin/sh\necho $$ > {asked}.new && mv {asked}.new {asked} && exec sleep 100\n")
    vllm.chmod(0o755)
    environ = clean_environment(SUPERVISOR_VLLM=str(vllm), TMPDIR=str(temporary), SUPERVISOR_CACHE_DIR=str(tmp_path))
    with subprocess.Popen([SUPERVISOR, "explain", "m"], env=environ, stderr=subprocess.PIPE) as process:
        wait_until(asked.exists, "vLLM was asked for its version")
        process.send_signal(signal.SIGINT)
        assert (process.wait(10), process.stderr.read()) == (130, b"")  # type: ignore[union-attr]
    assert not psutil.pid_exists(int(asked.read_text()))
    assert not list(temporary.iterdir())


# Addresses with a password in them


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "--url", "http://user:{}@localhost:1"],
        ["status", "--url", "user:{}@localhost:1"],
        ["status", "--url", "ftp://user:{}@localhost"],
        ["status", "--url", "http://user:p@{}@localhost:1"],
        ["status", "--url", "http://user:{}/+w=@localhost:1"],
        ["status", "--url", "http://localhost:1/?token={}"],
        ["job", "{}", "--url", "http://user:{}@localhost:1"],
        ["job", "{}", "--url", "user:{}@localhost:99999"],
        ["job", "http://user:{}@localhost/x"],
        ["status", "http://user:{}@localhost"],
        ["http://user:{}@localhost"],
        ["explain", "a", "http://user:{}@localhost"],
        ["explain", "a", "--hf-token", "{}"],
        ["explain", "a", "--api-key={}"],
        ["explain", "http://user:{}@localhost/model"],
        ["explain", "https://huggingface.co/a/b?token={}"],
        ["explain", "a", "--host", "http://user:{}@localhost"],
        ["explain", "a", "--config", "http://user:{}@localhost/x.yaml"],
        ["explain", "a", "--", "--foo", "http://user:{}@localhost"],
        ["explain", "a", "--", "http://user:{}@localhost"],
    ],
)
def test_a_password_in_an_address_is_not_shown(asked: Asked, arguments: list[str]) -> None:
    done = asked(*(word.replace("{}", "Zx9-qW_7.plain") if word != "{}" else word for word in arguments))
    said = done.stdout + done.stderr
    assert "****" in said
    assert "Zx9" not in said


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HTTPS_PROXY", "SUPERVISOR_HOST", "MODEL", "OTLP_TRACES_ENDPOINT"])
@pytest.mark.parametrize("verb", ["explain", "status", "doctor"])
def test_nor_is_one_of_the_environments(asked: Asked, verb: str, name: str) -> None:
    arguments = ["--url", "http://example.invalid"] if verb == "status" else []
    for scheme in ("", "http://") if name in ("HF_ENDPOINT", "HTTPS_PROXY") else ("http://",):
        done = asked(verb, *arguments, **{"MODEL": "m", name: f"{scheme}user:Zx9-qW_7.plain@localhost:1"})
        assert "Zx9" not in done.stdout + done.stderr
