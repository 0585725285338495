"""Reading the file of settings, and the file that vLLM's own `--config` names.

A file is read when `--config` or SUPERVISOR_CONFIG names it. A `config.yaml` that merely lies in the current folder may
be another program's: it is read only where it says that it is ours, and is passed over with a warning otherwise.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.bounded import read_file

CONFIG_NAME = "config.yaml"
# What says that a file is ours, beside a `supervisor:` section: the first line of our example, which editors go by.
SCHEMA_LINE = re.compile(r"\ufeff?# *yaml-language-server: *\$schema=(\S*/)?config\.schema\.json\s")
# The section, in a file that is too broken for YAML to tell.
SECTION = re.compile(r"^supervisor\s*:(\s|$)", re.MULTILINE)


class MalformedError(Exception):
    """A file does not hold what it should; the text goes on after the file's name."""


@dataclass(slots=True)
class ConfigFile:
    """`label` is how the user named it; keys are normal (`max_model_len`), values as YAML made them."""

    label: str
    is_named: bool = True  # else it lay in the current folder
    content: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, why: str) -> None:
        self.problems.append(f"{self.label} {why}")

    def pass_over(self, why: str) -> None:
        advice = "Name it with --config (or SUPERVISOR_CONFIG) if it is meant for this."
        self.warnings.append(f"{self.label} in this folder is not read: it {why}. {advice}")


def read(name: str, source: str) -> ConfigFile:
    """Reads the file that `source` names, such as `environment SUPERVISOR_CONFIG`."""
    file = ConfigFile(name)
    with _told(file.problem, source):
        _fill(file, _mapping(read_file(Path(os.path.expanduser(name))).decode()))  # noqa: PTH111  # ~nobody stays as it is
    return file


def read_unnamed() -> ConfigFile:
    """Reads `config.yaml` in the current folder, where it is there and ours; what is returned is empty otherwise."""
    file, path, text = ConfigFile(CONFIG_NAME, is_named=False), Path(CONFIG_NAME), ""
    with _told(file.pass_over):
        if path.is_file():  # reading a pipe would wait for somebody who writes
            text = read_file(path).decode()
        elif path.exists() or path.is_symlink():
            file.pass_over("is not a file")
    with _told(file.problem):
        if (content := _content_of_ours(text)) is not None:
            _fill(file, content)
        elif any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
            file.pass_over("has no `supervisor:` section")
    return file


def read_vllm_config(path: str, source: str) -> ConfigFile:
    """Looks into the file of vLLM's own `--config`, which vLLM reads itself, for what concerns us."""
    file = ConfigFile(f"{path} ({source})")
    with _told(file.problem):
        if Path(path).suffix not in (".yaml", ".yml"):  # vLLM's own rule
            raise MalformedError("is no YAML file, such as /path/vllm.yaml")
        file.content = _mapping(read_file(Path(path), again=True).decode())
    return file


@contextmanager
def _told(tell: Callable[[str], None], source: str = "") -> Iterator[None]:
    """Hands to `tell` why a file can't be used; `source` named it."""
    try:
        yield
    except OSError as error:
        tell(f"can't be read ({error.strerror}{source and f'; named by {source}'})")
    except UnicodeDecodeError as error:
        tell(f"is not a text ({error.reason} at byte {error.start})")
    except MalformedError as error:
        tell(str(error))


def _normal_keys(mapping: dict[Any, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_").lower(): value for key, value in mapping.items()}


def _fill(file: ConfigFile, content: dict[str, Any]) -> None:
    knobs = content.pop("supervisor", None) or {}
    if isinstance(knobs, dict):
        every = _normal_keys(knobs).items()  # lists are texts as a variable's
        file.knobs = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in every}
    else:
        file.problems.append(f"{file.label}: 'supervisor' must be a mapping, such as 'supervisor: {{port: 8000}}'")
    file.content = content


def _content_of_ours(text: str) -> dict[str, Any] | None:
    """Returns what is in a file that says that it is ours, and None for any other. Raises MalformedError."""
    has_schema_line = SCHEMA_LINE.match(text) is not None
    if not has_schema_line and "supervisor" not in text:
        return None  # PyYAML takes 30 ms to import, and seconds for a large file
    try:
        content = _mapping(text)
    except MalformedError:
        if has_schema_line or SECTION.search(text):
            raise
        return None
    return content if has_schema_line or isinstance(content.get("supervisor", ""), dict | None) else None


def _mapping(text: str) -> dict[str, Any]:
    import yaml  # noqa: PLC0415  # takes 30 ms, and most starts have no file

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:  # to YAML the last one counts
                raise yaml.MarkedYAMLError(problem=f"{twice[0]} is there twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    try:  # as JSON has it: a date is a text
        content = json.loads(json.dumps(yaml.load(text, Loader), default=lambda date: date.isoformat()))  # noqa: S506
    # PyYAML lets through what its readers of values raise, such as `!!bool maybe`; a mapping may hold itself.
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        where = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        nested = "it is nested too deeply" if isinstance(error, RecursionError) else None
        why = nested or getattr(error, "problem", None) or error
        raise MalformedError(f"is not valid YAML{where}: {why}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = "text" if isinstance(content, str) else type(content).__name__
        raise MalformedError(f"must be a mapping, such as 'max_model_len: 4096', not a {kind}")
    return _normal_keys(content)
