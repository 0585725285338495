"""Command line > environment > config.yaml > defaults. Every value remembers where it came from and what it overrode.

`gather` reads all of it once and finds every problem in one go: either frozen `Settings` come out, or one
`SettingsError` with a line for each thing to change. An empty string means unset (RunPod's Hub injects every default).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.settings import catalogue as catalogues
from supervisor.settings import demo
from supervisor.settings.aliases import ALIASES, OWNED
from supervisor.settings.catalogue import BadValue, Catalogue, Option
from supervisor.settings.knobs import KNOBS, Knob, Knobs
from supervisor.settings.vllm import Vllm, VllmError, find

# In queue mode a failed worker is better off telling the cause in each job than in a loop of starts that are paid for.
QUEUE_DEFAULTS = {"SUPERVISOR_ON_FAILURE": "serve", "SUPERVISOR_MAX_CONCURRENCY": "30"}
CONFIG_NAME = "config.yaml"
MASK = "****"


class SettingsError(Exception):
    """Invalid settings: `problems` has one line for each, which says what to change."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the command line of `up` and `explain` says. None means: not given."""

    model: str | None = None
    config: str | None = None
    mode: str | None = None
    host: str | None = None
    port: str | None = None
    vllm_args: tuple[str, ...] = ()


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
        return "" if self.value is None else str(self.value)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the user asked for. Nothing reads the environment after this."""

    model: Setting
    mode: str  # http or queue
    options: tuple[tuple[Option, Setting], ...]
    knobs: Knobs
    knob_settings: tuple[Setting, ...]
    vllm_args: tuple[str, ...]
    vllm: Vllm
    is_demo: bool
    cache: Path
    notes: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)

    def asked_for(self, variable: str) -> bool:
        """Whether the user set one of the supervisor's own settings."""
        return any(knob.name == variable and not knob.source.startswith("default") for knob in self.knob_settings)


def gather(arguments: Arguments, environ: Mapping[str, str]) -> Settings:
    """Reads every source. Raises SettingsError with all problems at once."""
    return _Gathering(arguments, environ).settings()


class _Gathering:
    """One pass over the sources; `problems` and `notes` fill on the way."""

    def __init__(self, arguments: Arguments, environ: Mapping[str, str]) -> None:
        self.arguments = arguments
        self.environ = environ
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.file_label, content = self._read_config()
        self.file_knobs = content.pop("supervisor", None) or {}
        if not isinstance(self.file_knobs, dict):
            self.problems.append(
                f"{self.file_label}: 'supervisor' must be a mapping, such as 'supervisor: {{port: 8000}}'"
            )
            self.file_knobs = {}
        self.file_knobs = {_normal(key): value for key, value in self.file_knobs.items()}
        self.file = {_normal(key): value for key, value in content.items()}

    def settings(self) -> Settings:
        first, *others = KNOBS
        asked = self._knob(first)
        mode = self._mode(asked.value)
        defaults = QUEUE_DEFAULTS if mode == "queue" else {}
        knob_settings = (asked, *(self._knob(knob, defaults.get(knob.variable)) for knob in others))
        knobs = Knobs(**{knob.field: setting.value for knob, setting in zip(KNOBS, knob_settings, strict=True)})
        self._known({knob.field for knob in KNOBS}, self.file_knobs, "supervisor.")
        cache = self._cache(knobs)
        vllm, catalogue = self._vllm(knobs, cache)
        model, is_demo = self._model()
        options = self._options(catalogue, demo.DEFAULTS if is_demo else {}) if catalogue else ()
        vllm_args = (*(knobs.extra_args or ()), *self.arguments.vllm_args)
        self._check_raw(vllm_args)
        if self.problems or vllm is None or model is None:
            raise SettingsError(self.problems)
        return Settings(
            model,
            mode,
            options,
            knobs,
            knob_settings,
            vllm_args,
            vllm,
            is_demo,
            cache,
            tuple(self.notes),
            dict(self.environ),
        )

    # The sources

    def _read_config(self) -> tuple[str, dict[str, Any]]:
        asked = self.arguments.config
        path = Path(asked or CONFIG_NAME)
        if asked is None and not path.exists():
            return CONFIG_NAME, {}
        import yaml  # noqa: PLC0415  # takes 30 ms, and most starts have no file

        label = str(path)
        try:
            content = yaml.safe_load(path.read_text())
        except OSError as error:
            self.problems.append(f"{label} can't be read ({error.strerror}): name a file with --config")
            return label, {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
            what = getattr(error, "problem", None) or str(error)
            self.problems.append(f"{label} is not valid YAML{where}: {what}")
            return label, {}
        if content is None:
            return label, {}
        if not isinstance(content, dict):
            self.problems.append(f"{label} must be a mapping, such as 'max_model_len: 4096', not a {_kind(content)}")
            return label, {}
        return label, {str(key): value for key, value in content.items()}

    def _candidates(self, name: str, key: str, file: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
        """Every source that names it, the one that wins first."""
        found = []
        for variable in (name, *ALIASES.get(name, ())):
            if self.environ.get(variable):
                found.append((f"environment {variable}", self.environ[variable]))
        if file.get(key) not in (None, ""):
            found.append((f"{self.file_label} {prefix}{key}", file[key]))
        return found

    def _known(self, known: Iterable[str], given: Iterable[str], prefix: str = "") -> None:
        """A key of config.yaml that nothing reads is an error: the file was written for us."""
        known = list(known)
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {prefix}{near[0]}?" if near else ""
                self.problems.append(f"{self.file_label}: unknown key {prefix}{key}{hint}")

    # The parts of the settings

    def _knob(self, knob: Knob, queue_default: str | None = None) -> Setting:
        found = self._candidates(knob.variable, knob.field, self.file_knobs, "supervisor.")
        asked = getattr(self.arguments, knob.field, None) if knob.field in ("mode", "host", "port") else None
        if asked:
            found.insert(0, (f"command line --{knob.field}", asked))
        if queue_default is not None:
            found.append(("default of queue mode", queue_default))
        elif knob.default is not None:
            found.append(("default", knob.default))
        if not found:
            return Setting(knob.variable, None, "default")
        source, given = found[0]
        try:
            value: object = knob.read(str(given))
        except BadValue as error:
            shown = MASK if knob.secret else given
            self.problems.append(f"{knob.variable}={shown} ({source}): expected {error}")
            value = None
        return Setting(knob.variable, value, source, _overrode(found, knob.secret), knob.secret)

    def _cache(self, knobs: Knobs) -> Path:
        if knobs.cache_dir:
            return Path(knobs.cache_dir)
        volume = Path("/runpod-volume")
        if volume.is_dir():
            return volume / "supervisor"
        home = self.environ.get("XDG_CACHE_HOME") or os.path.join(self.environ.get("HOME", "/tmp"), ".cache")  # noqa: PTH118, S108
        return Path(home) / "vllm-supervisor"

    def _vllm(self, knobs: Knobs, cache: Path) -> tuple[Vllm | None, Catalogue | None]:
        try:
            vllm = find(knobs.vllm, self.environ.get("PATH"), cache)
            return vllm, catalogues.load(vllm, cache)
        except VllmError as error:
            self.problems.append(str(error))
            return None, None

    def _model(self) -> tuple[Setting | None, bool]:
        found = self._candidates("MODEL", "model", self.file)
        if self.arguments.model:
            found.insert(0, ("command line", self.arguments.model))
        if not found:
            platform = demo.platform(self.environ)
            if platform is not None:
                self.problems.append(f"no model is named: set MODEL, such as MODEL=Qwen/Qwen3-0.6B ({platform})")
                return None, False
            found = [("demo model: no model is named", str(demo.MODEL))]
        source, given = found[0]
        name = str(given)
        if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
            folder = Path(name).expanduser()
            if not folder.exists():
                self.problems.append(f"MODEL={name} ({source}): no such folder")
                return None, False
            name = str(folder)
        is_demo = Path(name).resolve() == demo.MODEL
        return Setting("MODEL", name, source, _overrode(found)), is_demo

    def _options(self, catalogue: Catalogue, defaults: Mapping[str, object]) -> tuple[tuple[Option, Setting], ...]:
        self._known([*catalogue.by_key, "model"], self.file)
        options = []
        for option in catalogue.by_key.values():
            if option.key == "model":
                continue
            found = self._candidates(option.variable, option.key, self.file)
            if option.key in OWNED:
                for source, _ in found:
                    if source not in ("environment PORT", "environment HF_TOKEN"):  # ours, and passed on as it is
                        self.notes.append(f"{source} is not passed to vLLM: {OWNED[option.key]}")
                continue
            if option.key in defaults:
                found.append(("demo model", defaults[option.key]))
            if not found:
                continue
            source, given = found[0]
            try:
                value = option.read(given)
            except BadValue as error:
                self.problems.append(f"{option.variable}={given} ({source}): expected {error}")
                continue
            options.append((option, Setting(option.variable, value, source, _overrode(found))))
        return tuple(options)

    def _check_raw(self, tokens: Iterable[str]) -> None:
        for token in tokens:
            key = token.partition("=")[0].removeprefix("--").replace("-", "_")
            if token.startswith("--") and key in OWNED:
                self.problems.append(f"{token.partition('=')[0]} can't be passed to vLLM: {OWNED[key]}")

    def _mode(self, asked: object) -> str:
        """http or queue. RunPod's load balancer may give its workers a queue's address as well."""
        if asked in ("http", "queue"):
            return str(asked)
        balanced = self.environ.get("PORT_HEALTH") or self.environ.get("HEALTH_CHECK_PATH")
        return "queue" if self.environ.get("RUNPOD_WEBHOOK_GET_JOB") and not balanced else "http"


def _overrode(found: list[tuple[str, Any]], secret: bool = False) -> tuple[str, ...]:
    return tuple(f"{source}: {MASK if secret else given}" for source, given in found[1:] if source != "default")


def _normal(key: object) -> str:
    return str(key).replace("-", "_").lower()


def _kind(content: object) -> str:
    return {"list": "list", "str": "text"}.get(type(content).__name__, type(content).__name__)
