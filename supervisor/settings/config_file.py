"""Reading `config.yaml`, and the file that vLLM's own `--config` names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.yaml"


@dataclass(slots=True)
class ConfigFile:
    """`label` is how the user named it; keys are normal (`max_model_len`), values as YAML made them."""

    label: str
    content: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read(asked: str | None) -> ConfigFile:
    """The file that was asked for, or `config.yaml` in the current folder, which need not be there."""
    file = ConfigFile(asked or CONFIG_NAME)
    if asked is None and not Path(CONFIG_NAME).exists():
        return file
    content = _mapping(file)
    knobs = content.pop("supervisor", None) or {}
    if isinstance(knobs, dict):
        file.knobs = {normal(key): value for key, value in knobs.items()}
    else:
        file.problems.append(f"{file.label}: 'supervisor' must be a mapping, such as 'supervisor: {{port: 8000}}'")
    file.content = {normal(key): value for key, value in content.items()}
    return file


def read_vllm_config(path: str, source: str) -> ConfigFile:
    """The file of vLLM's own `--config`: vLLM reads it itself, we look into it for what concerns us."""
    file = ConfigFile(f"{path} ({source})")
    if Path(path).suffix not in (".yaml", ".yml"):
        file.problems.append(f"CONFIG={path} ({source}): expected a YAML file, such as /path/vllm.yaml")
        return file
    file.content = {normal(key): value for key, value in _mapping(file, path).items()}
    return file


def normal(key: object) -> str:
    return str(key).replace("-", "_").lower()


def _mapping(file: ConfigFile, path: str | None = None) -> dict[str, Any]:
    import yaml  # noqa: PLC0415  # takes 30 ms, and most starts have no file

    try:
        content = yaml.safe_load(Path(path or file.label).read_text())
    except OSError as error:
        advice = "" if path else ": name a file with --config"
        file.problems.append(f"{file.label} can't be read ({error.strerror}){advice}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        where = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        what = getattr(error, "problem", None) or str(error)
        file.problems.append(f"{file.label} is not valid YAML{where}: {what}")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = {"list": "list", "str": "text"}.get(type(content).__name__, type(content).__name__)
        file.problems.append(f"{file.label} must be a mapping, such as 'max_model_len: 4096', not a {kind}")
        return {}
    return {str(key): value for key, value in content.items()}
