#!/usr/bin/env python3
"""Writes the catalogue of the installed vLLM's options: supervisor/settings/flags/VERSION.json.

    .venv/bin/python scripts/dump_flags.py [--vllm COMMAND] [--check]

The options are read from vLLM's own parser, in vLLM's environment, by supervisor/settings/flags/dump.py (12 s, nearly
all of it import). `--check` writes nothing and exits 1 where the shipped file is not what this vLLM has.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from supervisor.settings.catalogue import FLAGS, dump, parse
from supervisor.settings.vllm import VllmError, find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="COMMAND", default=os.environ.get("SUPERVISOR_VLLM"))
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as cache:
            text = dump(find(arguments.vllm, os.environ.get("PATH"), Path(cache)))
    except VllmError as error:
        sys.exit(f"dump_flags: {error}")
    catalogue = parse(text)
    file = FLAGS / f"{catalogue.version}.json"
    if arguments.check:
        if not file.exists() or file.read_text() != text:
            sys.exit(f"dump_flags: {file.name} is not what vLLM {catalogue.version} has: run scripts/dump_flags.py")
        print(f"{file.name} is what vLLM {catalogue.version} has: {len(catalogue.by_key)} options")
        return
    file.write_text(text)
    print(f"{file.name}: {len(catalogue.by_key)} options")


if __name__ == "__main__":
    main()
