"""Finds uv for the scripts that install, and tells it what pip is configured with.

    found=$(python3 scripts/find_uv.py) && eval "$found"
    "$UV" pip install ...

The uv on PATH is taken, unless it is too old; otherwise pip brings the wheel that requirements/uv.txt locks into `.uv`.
uv does not read pip's configuration. What it says of indexes, certificates and the like is printed as uv's variables.
A variable that is set stays as it is, and whoever has a uv.toml has configured uv.

With `--lock`, for scripts/lock, it is always the locked uv, and what pip finds beside its index is left out: a lock has
the hashes of all platforms, and a folder of wheels may have those of one.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (0, 7)  # the first version that has all options that we use
SECTIONS = ("global", "install")  # of pip's configuration; the second goes before the first
# pip's option: uv's variable, and what separates several values there.
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "no-index": ("UV_OFFLINE", " "),  # the packages then lie in a folder, as a rule: find-links
    "no-cache-dir": ("UV_NO_CACHE", " "),
}
SWITCHES = {"no-index", "no-cache-dir"}


def read_configuration() -> dict[str, str]:
    """Returns pip's configuration as uv's variables. It is read as pip reads it: to ask pip would take a second."""
    home, environ = Path.home(), os.environ
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    system = [Path(each) for each in (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")]
    if environ.get("UV_CONFIG_FILE") or any((each / "uv/uv.toml").exists() for each in (user, *system, Path("/etc"))):
        return {}
    files = [*(each / "pip/pip.conf" for each in system), Path("/etc/pip.conf"), home / ".pip/pip.conf"]
    files += [
        home / "Library/Application Support/pip/pip.conf",
        user / "pip/pip.conf",
        Path(sys.base_prefix) / "pip.conf",
    ]
    named_file = environ.get("PIP_CONFIG_FILE", "")
    parser = configparser.RawConfigParser()
    parser.read([] if named_file == os.devnull else [*files, named_file])
    conf = {name: value for section in SECTIONS if parser.has_section(section) for name, value in parser.items(section)}
    conf |= {name[4:].lower().replace("_", "-"): value for name, value in environ.items() if name.startswith("PIP_")}
    variables: dict[str, str] = {}
    for option, (name, separator) in VARIABLES.items():
        value = separator.join(conf.get(option, "").split())
        if value and (option not in SWITCHES or value.lower() in {"1", "true", "yes", "on"}):
            variables[name] = value
    if "UV_INDEX" in variables:
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip's: the best version, whichever index has it
    return {name: value for name, value in variables.items() if not environ.get(name)}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def read_version(uv: str) -> tuple[int, ...]:
    """Returns the version of a uv, or (0,) if it does not run, as a version manager's stand-in may not."""
    return tuple(int(part) for part in re.findall(r"\d+", run(uv, "--version").stdout)[:2]) or (0,)


def install_uv() -> str:
    """Returns the path of our own uv. It is installed if it is missing or is not the one that is locked."""
    lock, folder = ROOT / "requirements/uv.txt", ROOT / ".uv"
    stamp, program = folder / "uv.txt", folder / "bin/uv"
    if stamp.exists() and stamp.read_text() == lock.read_text():
        return str(program)
    print("Fetching uv, which installs the rest ...", file=sys.stderr, flush=True)
    new = Path(tempfile.mkdtemp(prefix=".uv.", dir=ROOT))
    python = getattr(sys, "_base_executable", sys.executable)  # an environment that uv made has no pip
    try:
        pip = ["-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--target", str(new / "uv")]
        pip += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(lock)]
        done = run(python, *pip)
        if "No module named pip" in done.stderr:  # Debian has pip in one package, and venv, which brings it, in another
            run(python, "-m", "venv", str(new / "pip"))
            done = run(str(new / "pip/bin/python"), *pip)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip() and "is ignored" not in line]
            sys.exit("\n    ".join(["uv can't be fetched:", *errors[-8:]]))
        shutil.copy(lock, new / "uv/uv.txt")
        shutil.rmtree(folder, ignore_errors=True)
        (new / "uv").rename(folder)
    except FileNotFoundError:
        sys.exit(f"There is no uv on PATH, and {python} has neither pip nor venv to fetch it: install uv.")
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return str(program)


if __name__ == "__main__":
    locking = "--lock" in sys.argv
    found = None if locking else shutil.which("uv")
    if not found or read_version(found) < OLDEST:
        found = install_uv()
    for name, value in {"UV": found, **read_configuration()}.items():
        if locking and name in {"UV_INDEX", "UV_INDEX_STRATEGY", "UV_FIND_LINKS"}:
            continue
        print(f"export {name}={shlex.quote(value)}")
