"""Prints the options of the installed `vllm serve` as JSON, read from vLLM's own parser.

Runs in **vLLM's** environment, never in ours (`python dump.py`; it imports vllm, which takes some 12 s), so it stands
alone: nothing of this package is imported. What it prints is a catalogue file: names, kinds, types, choices, defaults.
No help texts: those are vLLM's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from importlib.metadata import version
from typing import Any

# Where the parser is made, newest first: the module moved between releases.
PARSER_MODULES = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
ARGPARSE_MODULES = ("vllm.utils.argparse_utils", "vllm.utils")

# The converters of vLLM's parser, by name, and what a value must look like for them.
TYPES = {
    "int": "int",
    "float": "float",
    "str": "str",
    "loads": "json",
    "parse_dataclass": "json",
    "union_dict_and_str": "json_or_str",
    "human_readable_int": "human_int",
    "human_readable_int_or_auto": "human_int_or_auto",
}


def first_of(modules: tuple[str, ...], name: str) -> Any:
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    sys.exit(f"dump: none of {', '.join(modules)} has {name}: this vLLM is not one that the dump knows")


def type_name(converter: Any) -> str:
    """The kind of value a converter takes; vLLM wraps converters of optional values in a closure."""
    while converter is not None and getattr(converter, "__closure__", None):
        inner = [cell.cell_contents for cell in converter.__closure__ if callable(cell.cell_contents)]
        if not inner or getattr(converter, "__name__", "") in TYPES:
            break
        converter = inner[0]
    return TYPES.get(getattr(converter, "__name__", "str"), "str")


def kind(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "pair"
    if action.nargs == 0:
        return "switch"
    if isinstance(action, argparse._AppendAction):
        return "append"
    if action.nargs in ("+", "*"):
        return "list"
    return "optional" if action.nargs == "?" else "value"


def jsonable(value: Any) -> Any:
    try:
        json.dumps(value)
    except TypeError:
        return sorted(value) if isinstance(value, set | frozenset) else str(value)
    return value


def option(action: argparse.Action) -> dict[str, Any]:
    longs = [name for name in action.option_strings if name.startswith("--") and not name.startswith("--no-")]
    row: dict[str, Any] = {"name": longs[0], "kind": kind(action)}
    if len(longs) > 1:
        row["also"] = longs[1:]
    if row["kind"] not in ("pair", "switch"):
        row["type"] = type_name(action.type)
        if action.choices is not None:
            row["choices"] = [choice for choice in action.choices if choice is not None]
    if action.default is not argparse.SUPPRESS:
        row["default"] = jsonable(action.default)
    return row


def main() -> None:
    # The defaults must not depend on who dumps: vLLM reads some of them from its environment.
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    make_arg_parser = first_of(PARSER_MODULES, "make_arg_parser")
    parser = make_arg_parser(first_of(ARGPARSE_MODULES, "FlexibleArgumentParser")())
    rows = [option(action) for action in parser._actions if action.option_strings and action.dest != "help"]
    catalogue = {"version": version("vllm").split("+")[0], "options": sorted(rows, key=lambda row: str(row["name"]))}
    rows_text = ",\n".join("  " + json.dumps(row) for row in catalogue["options"])
    print(f'{{"version": {json.dumps(catalogue["version"])}, "options": [\n{rows_text}\n]}}')


if __name__ == "__main__":
    main()
