"""The options of the installed `vllm serve`: what each is called, what values it takes, how it is written on argv.

One JSON file per vLLM version lies in `flags/`, dumped from vLLM's own parser by `flags/dump.py`. A version without a
file is dumped on the spot, in vLLM's environment, and kept in the cache folder.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.settings.vllm import Vllm, VllmError

FLAGS = Path(__file__).parent / "flags"
DUMP_TIMEOUT = 300.0

TRUE = frozenset({"true", "1", "yes", "on"})
FALSE = frozenset({"false", "0", "no", "off"})
# vLLM's human-readable integers: decimal suffixes small, binary ones large (`1k` is 1000, `1K` is 1024).
HUMAN_INT = re.compile(r"-?\d+|\d+(\.\d+)?[kmgtKMGT]")


class BadValue(ValueError):
    """A value that the option does not take; the text says what it expects, with an example."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of `vllm serve`. `kind`: value, list, pair (--x/--no-x), switch, append or optional."""

    name: str
    kind: str
    type: str
    choices: tuple[str, ...]

    @property
    def key(self) -> str:
        """As in config.yaml: `max_model_len`."""
        return self.name[2:].replace("-", "_")

    @property
    def variable(self) -> str:
        """As in the environment: `MAX_MODEL_LEN`."""
        return self.key.upper()

    def read(self, given: object) -> object:
        """The value that `given` (a string, or what YAML made of it) stands for. Raises BadValue."""
        if self.kind in ("pair", "switch"):
            return read_bool(given)
        if self.kind in ("list", "append"):
            return tuple(self._read_item(item) for item in _items(given))
        return self._read_item(given)

    def argv(self, value: object) -> list[str]:
        """How a value that `read` gave is written on vLLM's command line."""
        if self.kind == "pair":
            return [self.name if value else f"--no-{self.name[2:]}"]
        if self.kind == "switch":
            return [self.name] if value else []
        if isinstance(value, tuple):
            if self.kind == "append":
                return [token for item in value for token in self._pair(str(item))]
            return [self.name, *map(str, value)] if value else []
        return self._pair(str(value))

    def _pair(self, text: str) -> list[str]:
        # argparse takes a value that begins with a dash for an option, unless it is glued on.
        return [f"{self.name}={text}"] if text.startswith("-") else [self.name, text]

    def _read_item(self, given: object) -> str:
        if self.choices and str(given) not in self.choices:
            raise BadValue(f"one of {', '.join(self.choices)}")
        return READERS[self.type](given)


def read_bool(given: object) -> bool:
    if isinstance(given, bool):
        return given
    word = str(given).strip().lower()
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    raise BadValue("true or false")


def _items(given: object) -> list[object]:
    """A list as YAML gives it, or a string: a JSON list, or items between commas, or between spaces."""
    if isinstance(given, list | tuple):
        return list(given)
    text = str(given).strip()
    if text.startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadValue('a list: JSON like ["a", "b"], or a,b') from error
        return list(items)
    separator = "," if "," in text else None
    return [item.strip() for item in text.split(separator) if item.strip()]


def _int(given: object) -> str:
    if isinstance(given, bool) or not re.fullmatch(r"[+-]?\d+", str(given).strip()):
        raise BadValue("a whole number, such as 8")
    return str(given).strip()


def _float(given: object) -> str:
    try:
        float(str(given))
    except ValueError:
        raise BadValue("a number, such as 0.9") from None
    return str(given).strip()


def _text(given: object) -> str:
    if isinstance(given, dict | list):
        raise BadValue("a text")
    return _word(given)


def _word(given: object) -> str:
    return str(given).lower() if isinstance(given, bool) else str(given)


def _json(given: object) -> str:
    if isinstance(given, str):
        try:
            json.loads(given)
        except json.JSONDecodeError as error:
            raise BadValue(f'JSON, such as {{"key": "value"}} ({error.msg} at character {error.pos + 1})') from None
        return given
    return json.dumps(given)


def _json_or_text(given: object) -> str:
    return given if isinstance(given, str) else json.dumps(given)


def _human_int(given: object) -> str:
    text = _word(given).strip()
    if not HUMAN_INT.fullmatch(text):
        raise BadValue("a whole number, such as 4096, 32k (32000) or 32K (32768)")
    return text


def _human_int_or_auto(given: object) -> str:
    return "auto" if str(given).strip() == "auto" else _human_int(given)


READERS = {
    "int": _int,
    "float": _float,
    "str": _text,
    "json": _json,
    "json_or_str": _json_or_text,
    "human_int": _human_int,
    "human_int_or_auto": _human_int_or_auto,
}


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All options of one vLLM version, by `key` and by `variable`."""

    version: str
    by_key: Mapping[str, Option]
    by_variable: Mapping[str, Option]


def parse(text: str) -> Catalogue:
    """A catalogue file's text. Raises ValueError where it is none."""
    content: dict[str, Any] = json.loads(text)
    options = [
        Option(row["name"], row["kind"], row.get("type", "str"), tuple(map(str, row.get("choices", ()))))
        for row in content["options"]
    ]
    return Catalogue(
        content["version"], {option.key: option for option in options}, {option.variable: option for option in options}
    )


def load(vllm: Vllm, cache: Path) -> Catalogue:
    """The catalogue of the installed vLLM: shipped, cached, or dumped now. Raises VllmError."""
    name = f"{vllm.version}.json"
    for folder in (FLAGS, cache / "flags"):
        try:
            return parse((folder / name).read_text())
        except (OSError, ValueError, KeyError):
            continue  # not there, or a half-written cache file: made anew below
    text = dump(vllm)
    catalogue = parse(text)
    try:
        (cache / "flags").mkdir(parents=True, exist_ok=True)
        (cache / "flags" / name).write_text(text)
    except OSError:
        pass  # a read-only cache costs the next start the same 12 s, nothing else
    return catalogue


def dump(vllm: Vllm) -> str:
    """Runs `flags/dump.py` in vLLM's environment. Raises VllmError."""
    if vllm.python is None:
        raise VllmError(f"vLLM {vllm.version} is not a known version and its Python is not to be found beside it")
    try:
        done = subprocess.run(
            [*vllm.python, str(FLAGS / "dump.py")], capture_output=True, text=True, timeout=DUMP_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VllmError(f"the options of vLLM {vllm.version} can't be read: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise VllmError(f"the options of vLLM {vllm.version} can't be read: {last}")
    return done.stdout
