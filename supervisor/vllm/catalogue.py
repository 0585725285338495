"""The options of the installed `vllm serve`: what each is called, what values it takes, how argv has it.

One JSON file per vLLM version lies in `flags/`, dumped from vLLM's own parser by `flags/dump.py`. A version without a
file is dumped on the spot, in vLLM's environment, and kept in the cache folder.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from supervisor.vllm.installed import Vllm, VllmError, run_program, write_cache
from supervisor.vllm.values import ITEM_READERS, READERS, BadValue, clean, read_bool, read_choice, split_items, unfold

FLAGS = Path(__file__).parent / "flags"
DUMP_TIMEOUT = 300.0

# A number's bound, by its name in the catalogue (and in pydantic, from where the dump has it) -> what it says.
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}
SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)  # without slots: its names are asked for thousands of times at each start, and made once
class Option:
    """One option of `vllm serve`. `kind`: value, list, pair (--x/--no-x), switch, append or optional."""

    name: str
    kind: str
    type: str = "str"
    choices: tuple[str, ...] = ()
    default: object = None
    also: tuple[str, ...] = ()  # further long names
    short: tuple[str, ...] = ()
    off: tuple[str, ...] = ()  # names that switch a pair off, besides --no-x
    none: bool = False  # vLLM takes the text `None` for no value
    bounds: tuple[tuple[str, float], ...] = ()
    names: tuple[str, ...] = ()  # what else a text may be, unless a plugin knows more

    @cached_property
    def key(self) -> str:
        """The name in config.yaml: `max_model_len`."""
        return key_of(self.name)

    @cached_property
    def variable(self) -> str:
        """The name in the environment: `MAX_MODEL_LEN`."""
        return self.key.upper()

    @cached_property
    def is_switch(self) -> bool:
        """Tells whether its value is yes or no."""
        return self.kind in ("pair", "switch")

    @cached_property
    def is_template(self) -> bool:
        """Tells whether its value is a program with braces of its own."""
        return self.key == "chat_template"

    @cached_property
    def opposite(self) -> str | None:
        """The key that a pair `--enable-x` would have as `--disable-x`, and the other way round."""
        word, _, rest = self.key.partition("_")
        other = {"enable": "disable", "disable": "enable"}.get(word)
        return f"{other}_{rest}" if other and self.kind == "pair" else None

    def is_unset(self, given: object) -> bool:
        """Tells whether nothing is said: vLLM takes the text `None` for no value, which may be the default as well."""
        text = given.strip() if isinstance(given, str) else given
        return text in ("", None) or (
            text in ("None", "none", "null") and self.default is None and text not in self.choices
        )

    def read(self, given: object) -> object:
        """Returns the value that `given` (a text, or what YAML made of it) stands for. Raises BadValue."""
        if self.is_switch:
            return read_bool(given)
        if self.kind in ("list", "append"):
            found = tuple(self._read_item(clean(item), ITEM_READERS) for item in split_items(given))
            if self.kind == "list" and len(found) > 1 and any(item.startswith("-") for item in found):
                raise BadValue("items of which none begins with a dash")  # it would be an option of its own
            return found
        if self.type == "json" and isinstance(self.default, list) and not str(given).lstrip().startswith(("[", "{")):
            return json.dumps(split_items(given))  # ALLOWED_ORIGINS=https://a,https://b
        return self._read_item(given, READERS)

    def check(self, text: str) -> None:
        """Checks one value as it stands on vLLM's command line. Raises BadValue."""
        clean(text, template=self.is_template)
        if self.none and text in ("", "None"):
            return
        if self.type == "json" and isinstance(self.default, list) and not text.lstrip().startswith(("[", "{")):
            raise BadValue(f"JSON: write '{json.dumps(split_items(text))}'")
        value = self._read_item(text, READERS)
        if self.choices and value != text and self.type != "folded":
            raise BadValue(f"{value}, in these capitals and without blanks")

    def argv(self, value: object) -> list[str]:
        """Returns how vLLM's command line has a value that `read` returned."""
        if self.kind == "pair":
            return [self.name if value else f"--no-{self.name[2:]}"]
        if self.kind == "switch":
            return [self.name] if value else []
        if isinstance(value, tuple):
            if self.kind == "append" or (len(value) == 1 and str(value[0]).startswith("-")):
                return [token for item in value for token in self._write(str(item))]
            return [self.name, *map(str, value)] if value else []
        return self._write(str(value))

    def _write(self, text: str) -> list[str]:
        # argparse takes a value that begins with a dash for an option, unless it is glued on.
        return [f"{self.name}={text}"] if text.startswith("-") else [self.name, text]

    def _read_item(self, given: object, readers: Mapping[str, Callable[[object], str]]) -> str:
        if self.choices:
            return read_choice(given, self.choices)
        text = readers[self.type](given)
        text = (self.type == "folded" and unfold(text, self.names)) or text  # a plugin's parser may be called Hermes
        if self.bounds and text != "auto":
            number = float(text[:-1]) * SUFFIXES[text[-1]] if text[-1] in SUFFIXES else float(text)
            if not all(BOUNDS[name][1](number, bound) for name, bound in self.bounds):
                limits = " and ".join(f"{BOUNDS[name][0]} {bound:g}" for name, bound in self.bounds)
                raise BadValue(f"{limits}, such as {self._example()}")
        return text

    def _example(self) -> object:
        if isinstance(self.default, int | float):
            return self.default
        _, bound = self.bounds[0]
        return 4096 if self.type.startswith("human") else max(int(bound) + 1, 8)


@lru_cache(4096)  # a start asks for it some thousand times
def key_of(name: str) -> str:
    """Returns `max_model_len` for `--max-model-len`, however it is written."""
    return name.removeprefix("--").replace("-", "_").lower()


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All options of one vLLM version, by `key`, and the names of the variables that this vLLM reads itself."""

    version: str
    by_key: Mapping[str, Option]
    environment: frozenset[str] = frozenset()
    switches: frozenset[str] = frozenset()  # of these, the ones that are yes or no by a number

    def match(self, name: str) -> tuple[Option | None, bool]:
        """Returns the option that argparse takes `name` for, and whether it is a form that switches it off. A beginning
        that only one option has stands for the whole."""
        options, key = self.by_key.values(), key_of(name)
        if not name.startswith("--") or name != name.lower():  # of capitals vLLM knows those of short names alone
            return next((option for option in options if name in option.short), None), False
        forms = {key_of(form): (option, False) for option in options for form in (option.name, *option.also)}
        forms |= {f"no_{option.key}": (option, True) for option in options if option.kind == "pair"}
        forms |= {key_of(form): (option, True) for option in options for form in option.off}
        found = [forms[key]] if key in forms else [forms[form] for form in forms if form.startswith(key)]
        return found[0] if len(found) == 1 else (None, False)


@lru_cache(4)
def parse(text: str) -> Catalogue:
    """Reads a catalogue file's text. Raises ValueError where it is none."""
    content: dict[str, Any] = json.loads(text)
    options = map(_make_option, content["options"])
    environment, switches = (frozenset(content.get(name, ())) for name in ("environment", "switches"))
    return Catalogue(content["version"], {option.key: option for option in options}, environment, switches)


def _make_option(row: dict[str, Any]) -> Option:
    fields: dict[str, Any] = {name: row[name] for name in ("name", "kind", "type", "default", "none") if name in row}
    fields |= {name: tuple(map(str, row[name])) for name in ("choices", "also", "short", "off", "names") if name in row}
    return Option(**fields, bounds=tuple((name, row[name]) for name in BOUNDS if name in row))


def load(vllm: Vllm, cache: Path) -> Catalogue:
    """Returns the catalogue of the installed vLLM: shipped, cached, or dumped now. Raises VllmError."""
    name = f"{vllm.version}.json"
    for folder in (FLAGS, cache / "flags"):
        try:
            return parse((folder / name).read_text())
        except (OSError, ValueError, KeyError):
            continue  # not there, or a half-written cache file: made anew below
    text = dump(vllm)
    catalogue = parse(text)
    write_cache(cache / "flags" / name, text)
    return catalogue


def dump(vllm: Vllm) -> str:
    """Runs `flags/dump.py` in vLLM's environment, and returns its output. Raises VllmError."""
    if vllm.python is None:
        raise VllmError(f"vLLM {vllm.version} is not a known version and its Python is not to be found beside it")
    trouble = f"the options of vLLM {vllm.version} can't be read"
    result = run_program([*vllm.python, str(FLAGS / "dump.py")], DUMP_TIMEOUT, trouble)
    if result.returncode != 0:
        raise VllmError(f"{trouble}: {(result.stderr.strip().splitlines() or ['no output'])[-1]}")
    return result.stdout
