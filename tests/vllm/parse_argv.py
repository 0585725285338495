"""Runs in vLLM's environment: what vLLM's own parser makes of command lines.

Reads a JSON list of command lines from standard input, each the arguments of `vllm serve`, and prints for each all that
the parser made of it: `{"value": ...}`, or `{"error": ...}`. Values are told as texts, with their classes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

DUMP = Path(__file__).resolve().parents[2] / "supervisor/vllm/flags/dump.py"


def make_parser() -> Any:
    """Returns the parser of all of `vllm`: that of `serve` alone reads a file of options otherwise."""
    spec = importlib.util.spec_from_file_location("dump", DUMP)
    assert spec is not None and spec.loader is not None
    dump = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dump)
    dump.set_device_type()
    serve = importlib.import_module("vllm.entrypoints.cli.serve")
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    subparsers = parser.add_subparsers(dest="subparser")
    for command in serve.cmd_init():
        command.subparser_init(subparsers)
    return parser


def parse(parser: Any, arguments: list[str]) -> dict[str, object]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = parser.parse_args(["serve", *arguments])
    except SystemExit:
        return {"error": said.getvalue().strip().splitlines()[-1]}
    except Exception as error:  # noqa: BLE001  # whatever vLLM raises is the finding
        return {"error": repr(error)}
    return {"value": repr(sorted(vars(parsed).items()))}


def main() -> None:
    rows = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        parser = make_parser()
        found = [parse(parser, arguments) for arguments in rows]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
