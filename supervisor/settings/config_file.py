"""Reads the file of settings, and the file that vLLM's own `--config` names.

A file is read when `--config` or SUPERVISOR_CONFIG names it. A `config.yaml` that merely lies in the current folder may
be another program's: it is read only where it says that it is ours, and is passed over with a warning otherwise.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.bounded import read_file
from supervisor.settings.sources import Report

CONFIG_NAME = "config.yaml"
# These stand before and behind the reason why a file that nobody named is not read.
SKIP_MESSAGE = f"{CONFIG_NAME} in this folder is not read: it"
SKIP_ADVICE = ". Name it with --config (or SUPERVISOR_CONFIG) if it is meant for this."
# A file is ours by a `supervisor:` section, or by this line: the first one of our example, which editors go by.
SCHEMA_LINE = re.compile(r"\ufeff?# *yaml-language-server: *\$schema=(\S*/)?config\.schema\.json\s")
# This finds the section in a file that is too broken for YAML to tell.
SECTION_LINE = re.compile(r"^supervisor\s*:(\s|$)", re.MULTILINE)
# YAML 1.1 makes values of these types of bare words.
IMPLICIT_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))
# These settings of ours are words as a shell has them. All others that may be lists have commas between items.
SHELL_KEYS = ("extra_args", "vllm")


class MalformedError(Exception):
    """A file does not hold what it should. The text continues a sentence that begins with the file's name."""


@dataclass(slots=True)
class ConfigFile:
    """`label` is how the user named the file. Keys are normal (`max_model_len`), and values are as they are written."""

    label: str
    is_named: bool = True  # else it lay in the current folder
    content: dict[str, Any] = field(default_factory=dict)
    typed_content: dict[str, Any] = field(default_factory=dict)  # of vLLM's own file alone, as YAML and vLLM have it
    knobs: dict[str, Any] = field(default_factory=dict)


def read(source: str, value: object, report: Report) -> ConfigFile:
    """Reads the file that `source` names, such as `environment SUPERVISOR_CONFIG`."""
    file = ConfigFile(name := str(value).strip())
    with _report_errors(report.problems, name, source):
        text = read_file(Path(os.path.expanduser(name))).decode()  # noqa: PTH111  # ~nobody stays as it is
        _fill(file, _parse_mapping(text), report)
    return file


def read_unnamed(report: Report) -> ConfigFile:
    """Reads `config.yaml` in the current folder, where it is there and ours; what is returned is empty otherwise."""
    file, path, text = ConfigFile(CONFIG_NAME, is_named=False), Path(CONFIG_NAME), ""
    with _report_errors(report.warnings, SKIP_MESSAGE, suffix=SKIP_ADVICE):
        if path.exists() or path.is_symlink():
            text = read_file(path, regular_only=True).decode()
    with _report_errors(report.problems, CONFIG_NAME):
        if (content := _parse_own_content(text)) is not None:
            _fill(file, content, report)
        elif any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
            report.warnings.append(f"{SKIP_MESSAGE} has no `supervisor:` section{SKIP_ADVICE}")
    return file


def read_vllm_config(source: str, value: object, report: Report) -> ConfigFile:
    """Looks into the file of vLLM's own `--config`, which vLLM reads itself, for what concerns us."""
    file = ConfigFile(f"{(path := str(value).strip())} ({source})")
    with _report_errors(report.problems, file.label):
        if Path(path).suffix not in (".yaml", ".yml"):  # vLLM's own rule
            raise MalformedError("is no YAML file, such as /path/vllm.yaml")
        text = read_file(Path(path), regular_only=True).decode()
        file.content, file.typed_content = _parse_mapping(text), _parse_mapping(text, keep_types=True)
    return file


@contextmanager
def _report_errors(lines: list[str], label: str, source: str = "", *, suffix: str = "") -> Iterator[None]:
    """Adds a line that says why the file that `source` named can't be used."""
    try:
        yield
    except OSError as error:
        lines.append(f"{label} can't be read ({error.strerror}{source and f'; named by {source}'}){suffix}")
    except UnicodeDecodeError as error:
        lines.append(f"{label} is not a text ({error.reason} at byte {error.start}){suffix}")
    except MalformedError as error:
        lines.append(f"{label} {error}{suffix}")


def _normalize_keys(mapping: dict[Any, Any]) -> dict[str, Any]:
    names = [str(key).replace("-", "_").lower() for key in mapping]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise MalformedError(f"has {duplicates[0]} twice, written in two ways")
    return dict(zip(names, mapping.values(), strict=True))


def _fill(file: ConfigFile, content: dict[str, Any], report: Report) -> None:
    knobs = content.pop("supervisor", None) or {}
    if isinstance(knobs, dict):
        for key, value in _normalize_keys(knobs).items():  # a list becomes a text as in a variable
            join = shlex.join if key in SHELL_KEYS else ",".join
            file.knobs[key] = join(map(str, value)) if isinstance(value, list) and None not in value else value
    else:
        report.problems.append(f"{file.label}: 'supervisor' must be a mapping, such as 'supervisor: {{port: 8000}}'")
    file.content = content


def _parse_own_content(text: str) -> dict[str, Any] | None:
    """Returns what is in a file that says that it is ours, and None for any other. Raises MalformedError."""
    has_schema_line = SCHEMA_LINE.match(text) is not None
    if not has_schema_line and "supervisor" not in text:
        return None  # PyYAML takes 30 ms to import, and seconds for a large file
    try:
        content = _parse_mapping(text)
    except MalformedError:
        if has_schema_line or SECTION_LINE.search(text):
            raise
        return None
    return content if has_schema_line or isinstance(content.get("supervisor", ""), dict | None) else None


def _parse_mapping(text: str, *, keep_types: bool = False) -> dict[str, Any]:
    """Returns what a file of settings says, as it is written; only objects, which are JSON, have YAML's numbers and the
    like. `keep_types` takes all as YAML and vLLM do: `1.10` is 1.1, `no` is false. Keys stay. Raises MalformedError."""
    import yaml  # noqa: PLC0415  # takes 30 ms, and most starts have no file

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            key_path.append(index)
            node = super().compose_node(parent, index)
            key_path.pop()
            keys = [str(each.value).lower() for each in (*key_path, index) if isinstance(each, yaml.Node)]
            is_in_object = index is not None and len(keys) > 1 + (keys[:1] == ["supervisor"])
            is_bare = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in IMPLICIT_TAGS
            if node is None or not is_bare or keep_types or is_in_object:
                return node
            return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark)  # its aliases stay numbers

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if duplicates := [name for name in names if names.count(name) > 1]:  # to YAML the last one counts
                raise yaml.MarkedYAMLError(problem=f"{duplicates[0]} is there twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    key_path: list[Any] = []  # it has None for a key, its key for a value, a number for an item
    try:  # all becomes as JSON has it: a date is a text
        content = json.loads(json.dumps(yaml.load(text, Loader), default=lambda date: date.isoformat()))  # noqa: S506
    # PyYAML lets through what its readers of values raise, such as `!!bool maybe`; a mapping may hold itself.
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        line = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        nesting = "it is nested too deeply" if isinstance(error, RecursionError) else None
        reason = nesting or getattr(error, "problem", None) or error
        raise MalformedError(f"is not valid YAML{line}: {reason}") from None
    if not isinstance(content, dict | None):
        raise MalformedError(
            f"must be a mapping, such as 'seed: 1', not a {'text' if isinstance(content, str) else 'list'}"
        )
    if keep_types and content is None:
        raise MalformedError("is empty, at which vLLM fails: write a line into it, or don't name it")
    return (content if keep_types else _normalize_keys(content or {})) or {}
