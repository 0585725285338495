#!/usr/bin/env python3
"""Writes the catalogue of the installed vLLM's options: supervisor/vllm/flags/VERSION.json.

    .venv/bin/python scripts/dump_flags.py [--vllm COMMAND] [--check]

The options are read from vLLM's own parser, in vLLM's environment, by supervisor/vllm/flags/dump.py (12 s, nearly
all of it import). `--check` writes nothing and exits 1 where the shipped file is not what this vLLM has. The shipped
file is of the CUDA build, which has one choice more than the CPU build (`cuda`, of --mm-processor-device): more choices
are no difference. To write it anew, install the CUDA build; it needs no GPU for this.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from supervisor.vllm.catalogue import FLAGS, dump, parse
from supervisor.vllm.installed import VllmError, find


def is_same(shipped: dict[str, Any], dumped: dict[str, Any]) -> bool:
    """Returns whether both are the same, but for choices that only the shipped one has."""
    for ours, theirs in zip(shipped["options"], dumped["options"], strict=False):
        if set(theirs.get("choices", ())) < set(ours.get("choices", ())):
            theirs["choices"] = ours["choices"]
    return shipped == dumped


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
        if not file.exists() or not is_same(json.loads(file.read_text()), json.loads(text)):
            sys.exit(f"dump_flags: {file.name} is not what vLLM {catalogue.version} has: run scripts/dump_flags.py")
        print(f"{file.name} is what vLLM {catalogue.version} has: {len(catalogue.by_key)} options")
        return
    file.write_text(text)
    print(f"{file.name}: {len(catalogue.by_key)} options")


if __name__ == "__main__":
    main()
