"""Where values come from: command line > environment > config.yaml > the platform's defaults and ours.

An empty text means unset (RunPod's Hub injects every default), and every value goes through `values.clean`, whatever
its source. What is found wrong is collected in a `Report`, so that all of it is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from supervisor.secrets import MASK, Mask
from supervisor.settings.names import ALIASES, DEFAULTS, OURS, SAGEMAKER
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.installed import Vllm
from supervisor.vllm.values import BadValue, clean, read_bool, read_word

KEEPS_COMMENTS = "docker's --env-file keeps what stands behind a #"
LONGEST_SHOWN = 200  # characters of a value, in a line that tells what is wrong with it
# Variables that vLLM and its libraries read themselves, and that fail them where they are set to nothing, as compose's
# `${VAR:-}` and RunPod's Hub do: nine of thirteen that were tried ended vLLM with an error that names no variable.
THEIRS = re.compile(r"(VLLM|FLASHINFER|HF|HUGGING_?FACE|TRANSFORMERS|TORCHINDUCTOR|TRITON)_|CUDA_VISIBLE_DEVICES$")
MEANS_NONE = "CUDA_VISIBLE_DEVICES"  # set to nothing, it hides all GPUs


class Found(NamedTuple):
    """What one source says of a setting."""

    source: str
    given: Any


Source = Mapping[str, Found]  # by the variable that it stands for


def beneath(source: str) -> dict[str, Found]:
    return {variable: Found(source, given) for variable, given in DEFAULTS[source].items()}


class Arguments(NamedTuple):
    """What the command line of `up` and `explain` says. None means: not given."""

    model: str | None = None
    config: str | None = None
    mode: str | None = None
    host: str | None = None
    port: str | None = None
    vllm_args: tuple[str, ...] = ()

    @property
    def source(self) -> Source:
        named = {"SUPERVISOR_CONFIG": "config", "SUPERVISOR_MODE": "mode", "SUPERVISOR_HOST": "host", "PORT": "port"}
        found = {name: Found(f"command line --{field}", getattr(self, field)) for name, field in named.items()}
        return {"MODEL": Found("command line", self.model)} | found


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value. `overrode` tells of each source that named it too: `("config.yaml: 2048",)`."""

    name: str
    value: Any
    source: str
    overrode: tuple[str, ...] = ()
    secret: bool = False

    @property
    def named(self) -> str:
        """With its value and its source, as a problem begins."""
        return f"{self.name}={self.shown} ({self.source})"

    @property
    def shown(self) -> str:
        value = MASK if self.secret and self.value else self.value
        if isinstance(value, tuple):
            return " ".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else "" if value is None else read_word(value)


@dataclass(frozen=True, slots=True)
class Asked:
    """All that was asked for, by variable, and what was found out, such as the `mode`."""

    environ: Mapping[str, str]
    settings: Mapping[str, Setting]
    vllm: Vllm
    catalogue: Catalogue

    def __getitem__(self, name: str) -> Setting:
        """A setting, or a `$VARIABLE` as the environment has it."""
        if name.startswith("$"):
            return Setting(name[1:], self.environ.get(name[1:]), f"environment {name[1:]}")
        return self.settings.get(name) or Setting(name, None, "")

    def number(self, name: str | float, otherwise: float = 0) -> float:
        given = str(self[name].value if isinstance(name, str) else name)
        return float(given) if re.fullmatch(r"\d+(\.\d+)?", given) else otherwise

    def count(self, name: str, otherwise: int) -> int:
        return int(self.number(name, otherwise))


def environments(environ: Mapping[str, str]) -> list[Source]:
    """The environment as it is, and what SageMaker's prefix stands before."""
    texts = {name: Found(f"environment {name}", text) for name, text in environ.items()}
    return [texts, {name[len(SAGEMAKER) :]: texts[name] for name in texts if name.startswith(SAGEMAKER)}]


def find(sources: Iterable[Source], *names: str, blank: bool = False) -> list[Found]:
    """What the sources say of a setting, the one that wins first. `names`: its own, and others of vLLM's; those of
    other workers are looked for as well. `blank`: white space is a value. For a secret it is somebody's mistake: taken
    for "not set", it would leave the door open."""
    every = [each for name in names for each in (name, *ALIASES.get(name, ()))]
    found = [source[name] for source in sources for name in every if name in source]
    return [each for each in found if each.given not in (None, "") and (blank or str(each.given).strip())]


@dataclass(slots=True)
class Report:
    """What is wrong, and what has no effect: a line for each, which says what to change."""

    mask: Mask
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def shown(self, given: object) -> str:
        """A value for one line of text. Masked before it is cut: half a secret is not recognised any more."""
        text = self.mask(str(given).lower() if isinstance(given, bool) else str(given)).replace("\n", "\\n")
        return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."

    def overrode(self, found: Sequence[Found], *, secret: bool = False) -> tuple[str, ...]:
        named = (each for each in found if not each.source.startswith("default"))
        return tuple(f"{source}: {MASK if secret else self.shown(given)}" for source, given in named)

    def setting(
        self, name: str, found: Sequence[Found], read: Callable[[Any], object], *, secret: bool = False, **own: bool
    ) -> Setting | None:
        """What the first of the sources says; None where that can't be read, which is a problem then. `own`: see
        `values.clean`."""
        (source, given), *others = found
        comment = re.search(r"\s#", str(given))
        try:
            value = read(clean(given, **own))
        except BadValue as error:
            more = f"; {KEEPS_COMMENTS}" if comment else ""
            self.problems.append(f"{name}={MASK if secret else self.shown(given)} ({source}): expected {error}{more}")
            return None
        if comment and source.startswith("environment") and not (secret or own.get("template")):
            self.warnings.append(f"{name}={self.shown(given)} ({source}): {KEEPS_COMMENTS}")
        return Setting(name, value, source, self.overrode(others, secret=secret), secret)

    def cleaned(self, environ: Mapping[str, str], catalogue: Catalogue) -> dict[str, str]:
        """Of the variables that others read: those that are set to something, as it was meant. vLLM reads some as yes
        or no by a number, and `false` would end it."""
        found = {}
        for name, value in environ.items():
            is_theirs = THEIRS.match(name) and name not in OURS
            read = _switch if name in catalogue.switches else str
            setting = self.setting(name, [Found(f"environment {name}", value)], read) if is_theirs else None
            if not is_theirs or (setting and (setting.value or name == MEANS_NONE)):
                found[name] = setting.value if setting else value
        return found


def _switch(text: str) -> str:
    return text if text.lstrip("-").isdecimal() or not text else str(int(read_bool(text)))
