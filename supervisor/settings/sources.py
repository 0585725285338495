"""Where values come from: command line > environment > config.yaml > the platform's defaults and ours.

An empty text means unset (RunPod's Hub injects every default), and every value goes through `values.clean`, whatever
its source. What is found wrong is collected in a `Report`, so that all of it is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from supervisor.secrets import MASK, Mask
from supervisor.settings.config_file import ConfigFile
from supervisor.settings.names import SAGEMAKER
from supervisor.vllm.values import BadValue, clean

LONGEST_SHOWN = 200  # characters of a value, in a line that tells what is wrong with it


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the command line of `up` and `explain` says. None means: not given."""

    model: str | None = None
    config: str | None = None
    mode: str | None = None
    host: str | None = None
    port: str | None = None
    vllm_args: tuple[str, ...] = ()


class Found(NamedTuple):
    """What one source says of a setting."""

    source: str
    given: Any


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value. `overrode` tells of each source that named it too: `("config.yaml: 2048",)`."""

    name: str
    value: Any
    source: str
    overrode: tuple[str, ...] = ()
    secret: bool = False

    @property
    def shown(self) -> str:
        if self.secret and self.value:
            return MASK
        if isinstance(self.value, tuple):
            return " ".join(map(str, self.value))
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return f"{self.value:g}" if isinstance(self.value, float) else "" if self.value is None else str(self.value)


@dataclass(frozen=True, slots=True)
class Sources:
    """`find` asks all of them, the one that wins first."""

    arguments: Arguments
    environ: Mapping[str, str]
    prefixes: tuple[str, ...]  # that a variable's name may have
    file: ConfigFile

    def find(
        self, names: Sequence[str], key: str, *, knob: bool = False, blank: bool = False, argument: str | None = None
    ) -> list[Found]:
        """`names`: of variables; `key`: in config.yaml, a `knob` in its section. `blank`: white space is a value.
        For a secret it is somebody's mistake: taken for "not set", it would leave the door open."""
        found = [Found("command line" if key == "model" else f"command line --{key}", argument)] if argument else []
        for name in (prefix + name for prefix in self.prefixes for name in names):
            text = self.environ.get(name)
            if text and (blank or text.strip()):
                found.append(Found(f"environment {name}", text))
        content, section = (self.file.knobs, "supervisor.") if knob else (self.file.content, "")
        if content.get(key) not in (None, ""):
            found.append(Found(f"{self.file.label} {section}{key}", content[key]))
        return found


def prefixes(environ: Mapping[str, str]) -> tuple[str, ...]:
    return ("", SAGEMAKER) if any(name.startswith(SAGEMAKER) for name in environ) else ("",)


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
        return tuple(
            f"{source}: {MASK if secret else self.shown(given)}"
            for source, given in found
            if not source.startswith("default")
        )

    def setting(
        self,
        name: str,
        found: Sequence[Found],
        read: Callable[[Any], object],
        *,
        secret: bool = False,
        **own: bool,
    ) -> Setting | None:
        """What the first of the sources says; None where that can't be read, which is a problem then. `own`: see
        `values.clean`."""
        (source, given), *others = found
        try:
            value = read(clean(given, **own))
        except BadValue as error:
            if re.search(r"\s#", str(given)):
                error = BadValue(f"{error}; docker's --env-file keeps what stands behind a #")
            self.problems.append(f"{name}={MASK if secret else self.shown(given)} ({source}): expected {error}")
            return None
        return Setting(name, value, source, self.overrode(others, secret=secret), secret)
