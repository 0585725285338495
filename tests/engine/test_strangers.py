"""Who is not ours is left alone: a process that has the number of a dead engine, another user's folders and sockets."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.stand_ins import STAND_INS, Watched, missing
from tests.harness import SUPERVISOR, clean_environment, have_ended, session_pids, wait_until

SOMEBODY = 65534
FRESH = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable)


@pytest.fixture
def base() -> Iterator[Path]:
    """A temporary folder as /tmp is: everybody's. Not pytest's own, whose name is too long for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="strangers-") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        missing("another user's folders are not tried: that needs root")


# A number that is given away again


@pytest.fixture(scope="session")
def numbers() -> None:
    """Whether we can have a pid namespace, and choose the next process's number in it."""
    program = "open('/proc/sys/kernel/ns_last_pid', 'w').write('1000')"
    if os.geteuid() != 0:
        missing("numbers that come again are not tried: a pid namespace needs root")
    done = subprocess.run([*FRESH, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        missing(f"numbers that come again are not tried, for there is no pid namespace here: {done.stderr[-500:]}")


class Elsewhere(Watched):
    """One in another pid namespace: what it says of pids is no number of ours."""

    def engine(self) -> int:
        raise LookupError("its number means somebody else here")

    @property
    def number(self) -> int:
        """Of the engine that runs, over there."""
        pid: int = wait_until(lambda: self.client.get("/status").json()["pid"], "the engine's pid")
        return pid


class Namespaced(Elsewhere):
    """One in a pid namespace of its own, whose process 1 is stand_ins/namespace.py. All of it ends with the block."""

    def __init__(self, base: Path, **more: Any) -> None:
        control = base / "control"
        within = (*FRESH, str(STAND_INS / "namespace.py"), str(control), "--")
        environ = {"TMPDIR": str(base), **more.pop("environ", {})}
        super().__init__("m", within=within, environ=environ, **more)
        outside = psutil.Process(self.process.pid)
        (self.init,) = wait_until(outside.children, "process 1")
        (self.ours,) = wait_until(self.init.children, "the supervisor")
        self.control = socket.socket(socket.AF_UNIX)
        self.control.settimeout(20)
        self.control.connect(str(control))
        self.lines = self.control.makefile("rw")

    def __exit__(self, *what: Any) -> None:
        self.lines.close()
        self.control.close()
        super().__exit__(*what)

    def ask(self, what: str, number: int) -> int | bool:
        print(json.dumps([what, number]), file=self.lines, flush=True)
        answer = self.lines.readline()
        assert answer, "process 1 is gone"
        found: int | bool = json.loads(answer)
        return found


def workspaces(base: Path) -> list[Path]:
    return list(base.glob("supervisor-*"))


DIES_OF = {
    "backoff": "OSError: We couldn't connect to the hub",
    "failed": "torch.OutOfMemoryError: CUDA out of memory.",
}
SAYS = {"backoff": r"restart 1 of 20, in \d", "failed": r"-> failed"}
STAYS = {"SUPERVISOR_MAX_RESTARTS": "20", "SUPERVISOR_ON_FAILURE": "serve"}


@pytest.mark.parametrize(
    ("number", "state"),
    [
        (signal.SIGTERM, "failed"),
        pytest.param(signal.SIGTERM, "backoff", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "failed", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "backoff", marks=pytest.mark.slow),
    ],
)
def test_a_stranger_with_the_number_of_a_dead_engine_lives(numbers: None, base: Path, number: int, state: str) -> None:
    """Between two runs, and when there is none any more: neither the supervisor nor its guard has anything to kill."""
    plan = [{"die_at_start": {"log": [DIES_OF[state]], "code": 1, "after": 1.5}}]
    with Namespaced(base, plan=plan, environ=STAYS) as supervisor:
        dead = supervisor.number
        supervisor.says(SAYS[state])
        others = supervisor.ours.children(recursive=True)  # among them the guard
        assert others
        assert supervisor.ask("stranger", dead) == dead
        supervisor.ours.send_signal(number)
        wait_until(lambda: have_ended(supervisor.ours), "its end")
        wait_until(lambda: all(map(have_ended, others)), "the end of all that it had started")
        assert workspaces(base) == []
        assert supervisor.output.count("(fake), model") == 1, "it was started again too soon: this says nothing"
        assert supervisor.ask("lives", dead), "the stranger was killed"


@pytest.mark.slow
def test_a_leftovers_number_that_is_a_strangers_now(numbers: None, base: Path) -> None:
    """Guard and supervisor are killed; the number in their note is a session's whose leader has gone."""
    with Namespaced(base) as first:
        first.ready()
        dead = first.number
        (workspace,) = workspaces(base)
        wait_until(lambda: str(dead) in (workspace / "remains.json").read_text(), "the note of the session")
        family = [*first.ours.children(recursive=True), first.ours]
        first.ours.suspend()  # it must have no time to say that the engine is gone
        for process in family:
            process.kill()
        wait_until(lambda: all(map(have_ended, family)), "the end of all")
        assert workspace.exists()
        member = first.ask("orphan of N", dead)
        assert first.ask("lives", member)
        assert not first.ask("lives", dead)
        within = ("nsenter", "--target", str(first.init.pid), "--pid", "--mount")
        with Elsewhere("m", within=within, environ={"TMPDIR": str(base)}) as second:
            second.ready()
            wait_until(lambda: not workspace.exists(), "the leftover's removal")
            assert first.ask("lives", member), "the stranger was killed"


# Another user's folders, notes and sockets


def ticks(pid: int) -> str:
    """When a process started, in the kernel's ticks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class Victim:
    """A session that is nobody's business, and a file in shared memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(["sleep", "300"], start_new_session=True)
        wait_until(lambda: os.getsid(self.process.pid) == self.process.pid, "its session")
        self.segment = Path(f"/dev/shm/victim-{os.getpid()}-{self.process.pid}")
        self.segment.touch()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.segment.unlink(missing_ok=True)

    @property
    def unharmed(self) -> bool:
        return self.process.poll() is None and self.segment.exists()


class Note:
    """What a supervisor wrote of its engine, in whatever form, to be written again of another session."""

    def __init__(self, base: Path) -> None:
        environ = {"TMPDIR": str(base)}
        with Watched("m", plan=[{"shm": 1}], environ=environ) as supervisor:
            supervisor.ready()
            session = supervisor.engine()
            note = Path(supervisor.socket).parent / "remains.json"
            wait_until(lambda: f"psm_fake_{session}" in note.read_text(), "the note of its memory")
            self.content = json.loads(note.read_text())
            self.members = {str(pid): ticks(pid) for pid in session_pids(session)}

    def of(self, victim: Victim) -> str:
        pid, start = victim.process.pid, ticks(victim.process.pid)

        def rewritten(value: Any) -> Any:
            if isinstance(value, dict):
                return {rewritten(key): rewritten(each) for key, each in value.items()}
            if isinstance(value, list):
                return [rewritten(each) for each in value]
            if str(value) in self.members:
                return type(value)(pid)
            if str(value) in self.members.values():
                return type(value)(start)
            return str(victim.segment) if str(value).startswith("/dev/shm/") else value

        return json.dumps(rewritten(self.content))


def give_away(*paths: Path) -> None:
    for path in paths:
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)


def a_folder(path: Path, mode: int = 0o700) -> Path:
    path.mkdir()
    path.chmod(mode)  # whatever the umask
    (path / "tmp").mkdir()
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_only_a_note_that_nobody_else_could_have_written_is_believed(as_root: None, base: Path) -> None:
    """All of them name a living session, by its right start, and a file in shared memory."""
    with contextlib.ExitStack() as stack:
        note = Note(base)

        def victim(name: str) -> Victim:
            found = Victim(name)
            stack.callback(found.end)
            victims.append(found)
            return found

        victims: list[Victim] = []
        ours = victim("a leftover of ours")  # if this one lived, the others would prove nothing
        leftover = a_folder(base / "supervisor-1")
        write(leftover / "remains.json", note.of(ours))

        in_the_open = write(base / "remains.json", note.of(victim("a link to the temporary folder itself")))
        (base / "supervisor-evil").symlink_to(base)
        elsewhere = a_folder(base / "elsewhere")
        write(elsewhere / "remains.json", note.of(victim("a link to a folder of ours")))
        (base / "supervisor-evil2").symlink_to(elsewhere)
        theirs = a_folder(base / "supervisor-evil3")
        in_theirs = write(theirs / "remains.json", note.of(victim("a folder of somebody's")))
        ours_in_theirs = a_folder(base / "supervisor-evil4")
        write(ours_in_theirs / "remains.json", note.of(victim("a folder of somebody's with a note of ours")))
        forged = write(base / "forged", note.of(victim("a note that is a link")))
        (a_folder(base / "supervisor-2") / "remains.json").symlink_to(forged)
        not_ours = a_folder(base / "supervisor-3") / "remains.json"
        write(not_ours, note.of(victim("a note of somebody's")))
        hard = a_folder(base / "supervisor-4") / "remains.json"
        hard.hardlink_to(forged)
        opened = a_folder(base / "supervisor-5", 0o777)
        write(opened / "remains.json", note.of(victim("a folder that all can write to")))
        kept = [base / "supervisor-evil", base / "supervisor-evil2", in_the_open, theirs, in_theirs, ours_in_theirs,
                ours_in_theirs / "remains.json", elsewhere / "remains.json", forged]  # fmt: skip
        give_away(*kept[:6], forged, not_ours)

        with Watched("m", environ={"TMPDIR": str(base)}) as supervisor:
            supervisor.ready().engine()
            wait_until(lambda: not ours.unharmed and not leftover.exists(), "the end of our leftover")
            wait_until(lambda: not ours.segment.exists(), "the removal of its shared memory")
            assert [each.name for each in victims[1:] if not each.unharmed] == []
            assert [str(path) for path in kept if not os.path.lexists(path)] == []


class Impostor:
    """`requests()`: what a user's process that looks like a supervisor was asked."""

    def __init__(self, folder: Path) -> None:
        program: list[str | Path] = [sys.executable, STAND_INS / "impostor.py", str(SOMEBODY), folder]
        self.process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "listening\n"

    def requests(self) -> list[str]:
        """Ends it, and returns all that it was ever asked."""
        self.process.kill()
        said: str = self.process.communicate(timeout=10)[0]
        return said.splitlines()


@pytest.fixture
def impostor(as_root: None, base: Path) -> Iterator[Impostor]:
    """One in a folder of its own, which a link leads to as well, and in a folder that all can write to."""
    folder = base / "supervisor-evil"
    found = Impostor(folder)
    (base / "supervisor-evil2").symlink_to(folder)
    (a_folder(base / "supervisor-open", 0o777) / "gateway.sock").hardlink_to(folder / "gateway.sock")
    give_away(base / "supervisor-evil2")
    try:
        yield found
    finally:
        found.process.kill()
        found.process.communicate()


def ask(base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SUPERVISOR, *arguments],
        env=clean_environment(TMPDIR=str(base)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_another_users_socket_is_not_asked_how_it_is(impostor: Impostor, base: Path) -> None:
    done = ask(base, "status")
    assert (done.returncode, done.stdout) == (1, "")
    assert "none runs here" in done.stderr
    assert impostor.requests() == []


def test_another_users_socket_is_given_no_job(impostor: Impostor, base: Path) -> None:
    done = ask(base, "job", json.dumps({"prompt": "my private prompt"}))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no supervisor runs here" in done.stderr
    assert impostor.requests() == []


@pytest.mark.slow
def test_one_of_ours_is_found_beside_another_users(impostor: Impostor, base: Path) -> None:
    with Watched("of-ours", environ={"TMPDIR": str(base)}) as supervisor:
        supervisor.ready().engine()
        done = ask(base, "status")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"ready since .*: of-ours \(.*\n", done.stdout)
        supervisor.signal(signal.SIGTERM)
        supervisor.leaves(0, 15, "after SIGTERM")
    assert impostor.requests() == []


@pytest.mark.slow
def test_one_that_does_not_answer_hides_none_that_does(base: Path) -> None:
    environ = {"TMPDIR": str(base)}
    with Watched("that-answers", environ=environ) as one, Watched("that-stands-still", environ=environ) as other:
        one.ready().engine()
        other.ready().engine()
        silent = Path(other.socket).parent
        other.signal(signal.SIGSTOP)
        done = ask(base, "status")
        other.signal(signal.SIGCONT)
        assert re.search(r"(?m)^ready since .*: that-answers \(", done.stdout)
        assert "that-stands-still" not in done.stdout
        said = done.stdout + done.stderr
        assert re.search(rf"(?m)^.*{silent.name}.*(does not answer|did not answer|not answering)", said), said
        assert "Traceback" not in said
        assert done.returncode == 1
        for supervisor in (one, other):
            supervisor.signal(signal.SIGTERM)
            supervisor.leaves(0, 15, "after SIGTERM")


# Folders that were only half made


def an_hour_ago(*paths: Path) -> None:
    at = time.time() - 3600
    for path in paths:
        os.utime(path, (at, at), follow_symlinks=False)


@pytest.mark.slow
def test_half_made_workspaces_are_swept_when_they_are_old(base: Path) -> None:
    """One was killed before it had a note, one before it had its name; another is being made right now."""
    bare, noted, fresh = (base / f".supervisor-{name}" for name in ("bare", "noted", "fresh"))
    bare.mkdir(mode=0o700)
    write(a_folder(noted) / "remains.json", "")
    a_folder(fresh)
    kept = [fresh]
    an_hour_ago(bare, noted / "remains.json", noted / "tmp", noted)
    if os.geteuid() == 0:
        target = write(a_folder(base / "target") / "file", "").parent
        theirs, link = a_folder(base / ".supervisor-theirs"), base / ".supervisor-link"
        link.symlink_to(target)
        give_away(theirs, link)
        an_hour_ago(theirs, link, target)
        kept += [theirs, link, target / "file"]
    with Watched("m", environ={"TMPDIR": str(base)}) as supervisor:
        supervisor.ready().engine()
        wait_until(lambda: not bare.exists() and not noted.exists(), "the removal of the old ones", 5)
        assert [str(path) for path in kept if not os.path.lexists(path)] == []


def test_a_half_made_workspace_that_is_locked_is_somebodys(base: Path) -> None:
    """A machine may sleep, and a process be stopped, between any two lines."""
    half, bare = a_folder(base / ".supervisor-half"), base / ".supervisor-bare"
    bare.mkdir(mode=0o700)
    with write(half / "remains.json", "").open("r+") as note:
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        an_hour_ago(half / "remains.json", half / "tmp", half, bare)
        with Watched("m", environ={"TMPDIR": str(base)}) as supervisor:
            supervisor.ready().engine()
            wait_until(lambda: not bare.exists(), "the removal of what is nobody's", 5)
            assert (half / "remains.json").exists()
