"""Process 1 of a pid namespace of its own, where a process's number can be given to another one on purpose.

    unshare --pid --fork --mount-proc --kill-child python namespace.py CONTROL -- COMMAND...

runs the command and does what is asked at the unix socket CONTROL, a line of JSON each, and a line for the answer:

    ["stranger", N]       starts a process whose number is N, which leads a session and sleeps -> N
    ["orphan of N", N]    the same, and the leader leaves: another process sleeps in its session -> that one's number
    ["lives", N]          -> whether it is there, zombies left out

It reaps everybody, as process 1 has to, and stays until it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
PATIENCE = 10.0


def stranger(number: int, *, leaves: bool = False) -> int:
    """A session that is led by process `number`; returns the number of the process that stays in it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        reader, writer = os.pipe()
        LAST_PID.write_text(str(number - 1))
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                if os.getpid() == number:
                    _become_stranger(writer, leaves=leaves)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as said:
            if told := said.read():
                return int(told)
    raise TimeoutError(f"process {number} could not be had")


def _become_stranger(writer: int, *, leaves: bool) -> None:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if leaves and os.fork():
        return
    os.write(writer, str(os.getpid()).encode())
    os.close(writer)
    for descriptor in range(3):  # whoever reads the supervisor's output does not wait for a stranger
        os.close(descriptor)
    while True:
        signal.pause()


def lives(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def reap(*_: object) -> None:
    while True:
        try:
            pid = os.waitpid(-1, os.WNOHANG)[0]
        except ChildProcessError:
            return
        if pid == 0:
            return


def main(control: str, command: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(control)
        listener.listen()
        subprocess.Popen(command, stdin=subprocess.DEVNULL)
        signal.signal(signal.SIGCHLD, reap)
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as lines:
            for line in lines:
                what, number = json.loads(line)
                if what == "lives":
                    answer: object = lives(number)
                else:
                    answer = stranger(number, leaves=what == "orphan of N")
                lines.write(json.dumps(answer) + "\n")
                lines.flush()
    while True:
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3:])
