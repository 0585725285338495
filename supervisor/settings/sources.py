"""Values come from these sources: command line > environment > config.yaml > the platform's defaults and ours.

An empty text means unset (RunPod's Hub injects every default), and every value goes through `values.clean`, whatever
its source. What is found wrong is collected in a `Report`, so that all of it is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from supervisor.secrets import MASK, Mask
from supervisor.settings.names import ALIASES, BY_ALIAS, DEFAULTS, MESSAGES, SM_PREFIX
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.installed import Vllm
from supervisor.vllm.values import BadValue, clean, read_bool, read_word

LONGEST_VALUE = 200  # characters that are shown of a value, in a line that tells what is wrong with it
# vLLM and its libraries read these variables themselves, and fail where one is set to nothing, as compose's `${VAR:-}`
# and RunPod's Hub do: nine of thirteen that were tried ended vLLM with an error that names no variable.
ENGINE_NAME = re.compile(r"(VLLM|FLASHINFER|HF|HUGGING_?FACE|TRANSFORMERS|TORCHINDUCTOR|TRITON)_|CUDA_VISIBLE_DEVICES$")
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"  # set to nothing, it hides all GPUs


class Entry(NamedTuple):
    """One source says this of a setting. `source` is its name, and `value` is not read yet."""

    source: str
    value: Any


Source = Mapping[str, Entry]  # its entries, by the variable that each stands for


def presets(source: str) -> dict[str, Entry]:
    return {variable: Entry(source, value) for variable, value in DEFAULTS[source].items()}


class Arguments(NamedTuple):
    """The command line of `up` and `explain` says this. None means that an argument is not given."""

    model: str | None = None
    config: str | None = None
    mode: str | None = None
    host: str | None = None
    port: str | None = None
    vllm_args: tuple[str, ...] = ()

    @property
    def source(self) -> Source:
        fields = {"SUPERVISOR_CONFIG": "config", "SUPERVISOR_MODE": "mode", "SUPERVISOR_HOST": "host", "PORT": "port"}
        entries = {name: Entry(f"command line --{field}", getattr(self, field)) for name, field in fields.items()}
        return {"MODEL": Entry("command line", self.model)} | entries


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting has an effective value. `overrode` tells of sources that named it too: `("config.yaml: 2048",)`."""

    name: str
    value: Any
    source: str
    overrode: tuple[str, ...] = ()
    is_secret: bool = False

    @property
    def named(self) -> str:
        """Returns the name with its value and its source, as a problem begins."""
        return f"{self.name}={self.shown} ({self.source})"

    @property
    def shown(self) -> str:
        value = MASK if self.is_secret and self.value else self.value
        if isinstance(value, tuple):
            return " ".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else "" if value is None else read_word(value)


@dataclass(frozen=True, slots=True)
class Facts:
    """The rules look at all that was asked for, by variable, and at what was found out, such as the `mode`."""

    environ: Mapping[str, str]
    settings: Mapping[str, Setting]
    vllm: Vllm
    catalogue: Catalogue

    def __getitem__(self, name: str) -> Setting:
        """Returns a setting, or a `$VARIABLE` as the environment has it."""
        if name.startswith("$"):
            return Setting(name[1:], self.environ.get(name[1:]), f"environment {name[1:]}")
        return self.settings.get(name) or Setting(name, None, "")

    def number(self, name: str | float, default: float = 0) -> float:
        text = str(self[name].value if isinstance(name, str) else name)
        return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else default

    def integer(self, name: str, default: int) -> int:
        return int(self.number(name, default))


def env_sources(environ: Mapping[str, str]) -> list[Source]:
    """Returns the environment, and the variables that SageMaker's prefix stands before, without it. A service may have
    any name, such as master: what Kubernetes makes for it is left out."""
    names = [name for name, text in environ.items() if not (name.endswith("_PORT") and "://" in text)]
    texts = {name: Entry(f"environment {name}", environ[name]) for name in names}
    return [texts, {name[len(SM_PREFIX) :]: texts[name] for name in texts if name.startswith(SM_PREFIX)}]


def find_all(sources: Iterable[Source], *names: str, keep_blanks: bool = False) -> list[Entry]:
    """Returns what the sources say of a setting, the one that wins first. `names` are its own, and others of vLLM's;
    those of other workers are looked for as well. With `keep_blanks`, white space is a value: for a secret it is
    somebody's mistake, and taken for "not set" it would leave the door open."""
    all_names = [each for name in names for each in (name, *ALIASES.get(name, ()))]
    entries = [source[name] for source in sources for name in all_names if name in source]
    return [each for each in entries if each.value not in (None, "") and (keep_blanks or str(each.value).strip())]


@dataclass(slots=True)
class Report:
    """A report has a line for each thing that is wrong, or has no effect. The line says what to change."""

    mask: Mask
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def show(self, value: object) -> str:
        """Returns a value for a line of text, masked before it is cut: half a secret is not recognised any more."""
        text = self.mask(str(value).lower() if isinstance(value, bool) else str(value)).replace("\n", "\\n")
        return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."

    def describe(self, entries: Sequence[Entry], *, secret: bool = False) -> tuple[str, ...]:
        overridden = (each for each in entries if not each.source.startswith("default"))
        return tuple(f"{source}: {MASK if secret else self.show(value)}" for source, value in overridden)

    def read(
        self, name: str, entries: Sequence[Entry], read: Callable[[Any], object], *, secret: bool = False, **flags: bool
    ) -> Setting | None:
        """Returns what the first of the sources says, and None where that can't be read, which is a problem then.
        `flags` are for `values.clean`."""
        (source, raw), *overridden = entries
        comment = re.search(r"\s#", str(raw))
        try:
            value = read(clean(raw, **flags))
        except BadValue as error:
            hint = f"; {MESSAGES['comment']}" if comment else ""
            self.problems.append(f"{name}={MASK if secret else self.show(raw)} ({source}): expected {error}{hint}")
            return None
        if comment and source.startswith("environment") and not (secret or flags.get("template")):
            self.warnings.append(f"{name}={self.show(raw)} ({source}): {MESSAGES['comment']}")
        return Setting(name, value, source, self.describe(overridden, secret=secret), secret)

    def clean_environment(self, environ: Mapping[str, str], catalogue: Catalogue) -> dict[str, str]:
        """Returns the environment. Of the variables that others read it has those that are set to something, as it was
        meant: vLLM reads some as yes or no by a number, and `false` would end it."""
        variables = {}
        for name, value in environ.items():
            self.warnings += [MESSAGES[words]] if (words := f"{name}={value.strip()}") in MESSAGES else []
            is_engine_name = ENGINE_NAME.match(name) and name not in BY_ALIAS
            read = _read_switch if name in catalogue.switches else str
            setting = self.read(name, [Entry(f"environment {name}", value)], read) if is_engine_name else None
            if not is_engine_name or (setting and (setting.value or name == VISIBLE_DEVICES)):
                variables[name] = setting.value if setting else value
        return variables


def _read_switch(text: str) -> str:
    return text if text.lstrip("-").isdecimal() or not text else str(int(read_bool(text)))
