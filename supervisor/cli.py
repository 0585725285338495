"""The verbs of the `supervisor` command."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import time
from typing import NoReturn

from supervisor.secrets import complain
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather

EXIT_SETTINGS = 2
VERBS = {
    "up": "serve a model",
    "explain": "show every setting, its source, and vLLM's command",
    "status": "ask a running supervisor how it is; exit code 0 where it is ready",
    "fetch": "download the model, or say where it is",
    "doctor": "check the machine; exit code 0 where nothing failed",
    "job": "send one job to a supervisor in queue mode",
}
# These verbs need no valid settings: they ask a supervisor that runs, or tell what is wrong with the settings.
QUERIES = ("status", "doctor", "job")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one clear line each, instead of argparse's usage block."""

    def error(self, message: str) -> NoReturn:
        fail([f"{message} (see `{self.prog} --help`)"])


def fail(problems: list[str]) -> NoReturn:
    for problem in problems:
        complain(problem, os.environ)
    sys.exit(EXIT_SETTINGS)


def version() -> str:
    try:
        from supervisor import __version__  # noqa: PLC0415
    except ImportError:  # their __init__.py replaced ours, or was removed together with ours
        fail([
            "an unrelated package named supervisor (supervisord) was installed over this one, or removed from beside "
            f"it, in {sys.prefix}. vLLM's dependencies bring it: install vllm-supervisor in an environment of its own."
        ])  # fmt: skip
    return __version__


def add_scheme(url: str) -> str:
    return url if "://" in url or not url else f"http://{url}"


def parser() -> argparse.ArgumentParser:
    description = "Runs `vllm serve` as a child and relays to it."
    main_parser = _Parser(prog="supervisor", description=description, allow_abbrev=False)
    text = f"supervisor {version()}"
    main_parser.add_argument("-V", "--version", action="version", version=text, help="say which this is")
    found = main_parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    verbs = {name: found.add_parser(name, help=text, allow_abbrev=False) for name, text in VERBS.items()}
    for name in ("explain", "status", "doctor"):
        verbs[name].add_argument("--json", action="store_true", help="all of it, for machines")
    verbs["job"].add_argument("job", metavar="FILE|JSON|-", help="a job, or only its input (docs/jobs.md)")
    verbs["job"].add_argument("--stream", action="store_true", help="print the text as it comes")
    for name in ("status", "job"):
        help_text = "one on another machine, such as http://gpu1:8000"
        verbs[name].add_argument("--url", metavar="URL", type=add_scheme, help=help_text)
    for name in ("up", "explain", "fetch", "doctor"):
        verb = verbs[name]
        verb.add_argument("model", nargs="?", metavar="MODEL", help="a model's name on the hub, or a folder")
        verb.add_argument("--config", metavar="FILE", help="the file of settings; SUPERVISOR_CONFIG names it, too")
        verb.add_argument("--mode", metavar="MODE", help="auto, http or queue")
        verb.add_argument("--host", metavar="HOST", help="where the gateway listens")
        verb.add_argument("--port", metavar="PORT", help="the gateway's port")
        verb.epilog = "Everything after `--` goes to `vllm serve` as it is."
    return main_parser


def _describe_unknown(unknown: list[str]) -> str:
    """Returns a message about arguments that are not ours, such as vLLM's own `--max-model-len 4096`."""
    message = f"unrecognized arguments: {' '.join(unknown)}"
    if any(word.startswith("-") for word in unknown):
        message += f". Options of `vllm serve` go behind `--`: supervisor up MODEL -- {' '.join(unknown)}"
    return message


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, Arguments]:
    """Returns what the command line says. What follows `--` is vLLM's, and argparse never sees it."""
    separator = argv.index("--") if "--" in argv else len(argv)
    parsed, unknown = parser().parse_known_args(argv[:separator])
    if unknown:
        parser().error(_describe_unknown(unknown))
    options = {name: getattr(parsed, name, None) for name in ("model", "config", "mode", "host", "port")}
    return parsed, Arguments(**options, vllm_args=tuple(argv[separator + 1 :]))


def main(argv: list[str] | None = None) -> None:
    for name in ("stdin", "stdout", "stderr"):  # a closed one (`2>&-`) leaves its place to the next file opened
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115, PTH123  # to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale that can't say everything must not end what is printed
    parsed, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    code: int | str = EXIT_SETTINGS
    try:
        try:
            code = query(parsed, arguments) if parsed.verb in QUERIES else run(parsed, gather(arguments, os.environ))
        except SettingsError as error:
            if parsed.verb == "up" and os.environ.get("SUPERVISOR_LOG_FORMAT", "").strip().lower() == "json":
                log_problems(error)
            else:
                from supervisor import explain  # noqa: PLC0415

                explain.show_problems(error, as_json=getattr(parsed, "json", False))
        if parsed.verb not in ("up", "fetch"):
            sys.stdout.flush()
    except KeyboardInterrupt:  # nothing was started yet; afterwards the signal has a handler
        code = 128 + signal.SIGINT
    except OSError as error:  # the output of a verb that only prints: a full disk, no reader
        if parsed.verb in ("up", "fetch") or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE):
            raise
        code = 1 if isinstance(error, BrokenPipeError) else f"supervisor: its output can't be written: {error.strerror}"
    _forget_closed_output()
    sys.exit(code)


def log_problems(error: SettingsError) -> None:
    """Prints what ended the start of `up` as lines of its log, which is JSON."""
    from supervisor.lines import LineStyle  # noqa: PLC0415  # most starts have no problem

    for level, lines in (("ERROR", error.problems), ("WARNING", error.warnings)):
        for line in lines:
            print(LineStyle(str, as_json=True).line(level, "supervisor", line, time.time()), file=sys.stderr)


def _forget_closed_output() -> None:
    """Replaces output that nobody reads any more: Python's own last flush would turn a clean exit into code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def query(parsed: argparse.Namespace, arguments: Arguments) -> int:
    if parsed.verb == "doctor":
        from supervisor.doctor import examine  # noqa: PLC0415

        return examine.show(arguments, os.environ, as_json=parsed.json)
    if parsed.verb == "job":
        from supervisor.local_runpod import job  # noqa: PLC0415

        return job.run(parsed.job, parsed.url, os.environ, stream=parsed.stream)
    from supervisor import status  # noqa: PLC0415

    return status.show(parsed.url, os.environ, as_json=parsed.json)


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    if parsed.verb == "explain":
        from supervisor import explain  # noqa: PLC0415

        explain.show(settings, as_json=parsed.json)
        return 0
    if parsed.verb == "fetch":
        from supervisor.fetch import fetch  # noqa: PLC0415

        return fetch(settings)
    from supervisor.up import up  # noqa: PLC0415

    return up(settings)
