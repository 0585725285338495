"""Command line > environment > config.yaml > defaults. Every value remembers where it came from and what it overrode.

`gather` reads all of it once and finds every problem in one go: either frozen `Settings` come out, or one
`SettingsError` with a line for each thing to change. An empty string means unset (RunPod's Hub injects every default).
Nothing that was set is lost without a word: what has no effect is among the warnings.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.bounded import within
from supervisor.settings import catalogue as catalogues
from supervisor.settings import cluster as clusters
from supervisor.settings import config_file, demo, platform, typos
from supervisor.settings import volume as volumes
from supervisor.settings.aliases import ALIASES, OWNED, OWNED_AND_READ, SAGEMAKER, ZERO_MEANS_UNSET
from supervisor.settings.catalogue import Catalogue, Option
from supervisor.settings.knobs import KNOBS, SHORT_KEY, Keys, Knob, Knobs
from supervisor.settings.raw import Given, RawArguments
from supervisor.settings.removed import REMOVED
from supervisor.settings.respelled import NGRAM, respelled
from supervisor.settings.secrets import MASK, SHORTEST_SECRET, Mask
from supervisor.settings.values import BadValue, read_bool
from supervisor.settings.vllm import Vllm, VllmError, find

# Seconds for a disk to tell whether something is there. A network volume may hang.
DISK_PATIENCE = 3.0
LONGEST_SHOWN = 200  # characters of a value, in a line that tells what is wrong with it
# Our access log says more than vLLM's, which has a line for each look at its health besides.
INSTEAD_OF_VLLMS: dict[str, tuple[str, object]] = {"disable_uvicorn_access_log": ("SUPERVISOR_ACCESS_LOG", True)}


class SettingsError(Exception):
    """Invalid settings: `problems` has one line for each, which says what to change. Masked."""

    def __init__(self, problems: list[str], warnings: list[str] | None = None) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.warnings = warnings or []


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
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return f"{self.value:g}" if isinstance(self.value, float) else "" if self.value is None else str(self.value)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the user asked for. Nothing reads the environment after this."""

    model: Setting
    mode: str  # http or queue
    options: tuple[tuple[Option, Setting], ...]
    raw: tuple[tuple[Option, Setting], ...]  # what is in `vllm_args`
    knobs: Knobs
    knob_settings: tuple[Setting, ...]  # and which file of settings was named, if any
    vllm_args: tuple[str, ...]
    vllm: Vllm
    is_demo: bool
    cluster: clusters.Cluster | None  # of machines that serve the model together
    volume: volumes.Volume | None
    cache: Path
    warnings: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)

    def asked_for(self, variable: str) -> bool:
        """Whether the user set one of the supervisor's own settings."""
        return any(knob.name == variable and not knob.source.startswith("default") for knob in self.knob_settings)

    def option(self, key: str) -> Any:
        """The value of one of vLLM's options, by its key; None where nobody set it."""
        found = [setting.value for option, setting in (*self.options, *self.raw) if option.key == key]
        return found[-1] if found else None

    @property
    def mask(self) -> Mask:
        return Mask(self.environ, [key for keys in self.keys for key in keys.values])

    @property
    def keys(self) -> tuple[Keys, Keys]:
        """For clients, and for administrators."""
        return self.knobs.api_keys or Keys(), self.knobs.admin_keys or Keys()


def gather(arguments: Arguments, environ: Mapping[str, str]) -> Settings:
    """Reads every source. Raises SettingsError with all problems at once."""
    return _Gathering(arguments, environ).settings()


class _Gathering:
    """One pass over the sources; `problems` and `warnings` fill on the way."""

    def __init__(self, arguments: Arguments, environ: Mapping[str, str]) -> None:
        self.arguments = arguments
        self.environ = environ
        self.read = {"HF_TOKEN", "SUPERVISOR_IMAGE"}  # variables that were looked at
        self.derived: dict[str, tuple[str, str]] = {}  # from a cluster's variables
        self.prefixes = ("", SAGEMAKER) if any(name.startswith(SAGEMAKER) for name in environ) else ("",)
        self.names_of_file = self._names_of_file()
        self.file = self._file()
        self.problems: list[str] = [*self.file.problems]
        self.warnings: list[str] = [*self.file.warnings]
        hidden = {str(self.file.knobs[knob.field]) for knob in KNOBS if knob.secret and knob.field in self.file.knobs}
        self.mask = Mask(environ, hidden | {part.strip() for text in hidden for part in text.split(",")})

    def settings(self) -> Settings:
        first, *others = KNOBS
        asked = self._knob(first)
        mode = self._mode(asked.value)
        self.label, self.defaults = platform.defaults(mode, self.environ)
        knob_settings = (asked, *(self._knob(knob, self.defaults.get(knob.variable)) for knob in others))
        knobs = Knobs(**{knob.field: setting.value for knob, setting in zip(KNOBS, knob_settings, strict=True)})
        self._known({knob.field for knob in KNOBS}, self.file.knobs, "supervisor.")
        self._short_keys(knob_settings)
        self._tls(knobs)
        volume = self._volume(knobs)
        cache = self._cache(knobs, volume)
        vllm, catalogue = self._vllm(knobs, cache)
        raw: tuple[tuple[Option, Setting], ...] = ()
        options: tuple[tuple[Option, Setting], ...] = ()
        model, is_demo = self._model(catalogue)
        if catalogue:
            raw = self._raw(knob_settings, catalogue)
            self.derived = clusters.derived(self.environ, self._spread(raw))
            defaults = {key: ("demo model", value) for key, value in demo.DEFAULTS.items()} if is_demo else {}
            if knobs.access_log:
                defaults |= INSTEAD_OF_VLLMS
            options, raw = self._options(catalogue, defaults, raw)
            self._unread(catalogue)
        told = {setting.name: setting.value for _, setting in (*options, *raw)}
        cluster = clusters.cluster(told, self.environ, self.problems)
        if cluster is not None and cluster.headless:
            mode = "http"  # rank 0 takes the jobs
        if int(told.get("NNODES") or 1) < 2:
            options = self._of_one_machine(options, told_so=cluster is not None)
        self._platform(mode, (*options, *raw), knob_settings)
        problems, warnings = list(map(self.mask, self.problems)), list(map(self.mask, self.warnings))
        if problems or vllm is None or model is None:
            raise SettingsError(problems, warnings)
        return Settings(
            model=model,
            mode=mode,
            options=options,
            raw=raw,
            knobs=knobs,
            knob_settings=(*self._file_setting(), *knob_settings),
            vllm_args=(*(knobs.extra_args or ()), *self.arguments.vllm_args),
            vllm=vllm,
            is_demo=is_demo,
            cluster=cluster,
            volume=volume,
            cache=cache,
            warnings=tuple(warnings),
            environ=dict(self.environ),
        )

    # The sources

    def _names_of_file(self) -> list[tuple[str, str]]:
        """Every source that names the file of settings, the one that wins first."""
        found = self._variables(("SUPERVISOR_CONFIG",))
        if self.arguments.config and self.arguments.config.strip():
            found.insert(0, ("command line --config", self.arguments.config))
        return [(source, name.strip()) for source, name in found]

    def _file(self) -> config_file.ConfigFile:
        if not self.names_of_file:
            return config_file.read_unnamed()
        source, name = self.names_of_file[0]
        return config_file.read(name, source)

    def _file_setting(self) -> tuple[Setting, ...]:
        found = self.names_of_file
        return tuple(Setting("SUPERVISOR_CONFIG", name, source, self._lines(found[1:])) for source, name in found[:1])

    def _variables(self, names: Collection[str], *, blank: bool = False) -> list[tuple[str, str]]:
        """The variables among `names` that are set, the one that wins first. `blank`: to nothing but blanks, too."""
        variables = [prefix + name for prefix in self.prefixes for name in names]
        self.read.update(variables)
        given = [(name, self.environ.get(name, "")) for name in variables]
        return [(f"environment {name}", text) for name, text in given if (text if blank else text.strip())]

    def _candidates(
        self, names: Collection[str], key: str, *, knob: bool = False, secret: bool = False
    ) -> list[tuple[str, Any]]:
        """Every source that names it, the one that wins first."""
        # A blank secret is somebody's mistake: taken for "not set", it would leave the door open.
        found: list[tuple[str, Any]] = [*self._variables(names, blank=secret)]
        content, prefix = (self.file.knobs, "supervisor.") if knob else (self.file.content, "")
        if content.get(key) not in (None, ""):
            found.append((f"{self.file.label} {prefix}{key}", content[key]))
        return found

    def _lines(self, found: list[tuple[str, Any]], secret: bool = False) -> tuple[str, ...]:
        """What was overridden: each source with its value."""
        return tuple(
            f"{source}: {MASK if secret else self._shown(given)}"
            for source, given in found
            if not source.startswith("default")
        )

    def _shown(self, given: object) -> str:
        """A value for one line of text. Masked before it is cut: half a secret is not recognised any more."""
        text = self.mask(_normal_text(given)).replace("\n", "\\n")
        return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."

    def _bad(self, variable: str, given: object, source: str, error: BadValue) -> None:
        self.problems.append(f"{variable}={self._shown(given)} ({source}): expected {error}")

    def _known(self, known: Iterable[str], given: Iterable[str], prefix: str = "") -> None:
        """A key of config.yaml that nothing reads is an error: the file was written for us."""
        known = list(known)
        other = {alias.lower(): ours.lower() for ours, names in ALIASES.items() for alias in names}
        for key in given:
            if key in known:
                continue
            if key in REMOVED and not prefix:
                self.warnings.append(f"{self.file.label} {key} has no effect: {REMOVED[key]}")
                continue
            ours = other.get(key, "")
            where = f"supervisor.{ours.removeprefix('supervisor_')}" if ours.startswith("supervisor_") else ours
            hint = f"; use {where}" if where else typos.nearest(prefix + key, [prefix + name for name in known])
            self.problems.append(f"{self.file.label}: unknown key {prefix}{key}{hint}")

    # The parts of the settings

    def _knob(self, knob: Knob, platform_default: str | None = None) -> Setting:
        names = (knob.variable, *ALIASES.get(knob.variable, ()))
        found = self._candidates(names, knob.field, knob=True, secret=knob.secret)
        asked = getattr(self.arguments, knob.field, None) if knob.field in ("mode", "host", "port") else None
        if asked:
            found.insert(0, (f"command line --{knob.field}", asked))
        if platform_default is not None:
            found.append((self.label, platform_default))
        elif knob.default is not None:
            found.append(("default", knob.default))
        if not found or self._is_refused(knob, found[0][0]):
            return Setting(knob.variable, None, "default")
        source, given = found[0]
        try:
            value: object = knob.read(str(given))
        except BadValue as error:
            self._bad(knob.variable, MASK if knob.secret else given, source, error)
            value = None
        return Setting(knob.variable, value, source, self._lines(found[1:], knob.secret), knob.secret)

    def _is_refused(self, knob: Knob, source: str) -> bool:
        """Whether it names a program, and that only in a file that nobody named: a folder may be anybody's."""
        where = f"{self.file.label} supervisor.{knob.field}"
        if not knob.is_program or self.file.is_named or source != where:
            return False
        self.problems.append(
            f"{where} is not obeyed, for it names a program and nobody named the file: "
            f"name it with --config (or SUPERVISOR_CONFIG), or set {knob.variable}"
        )
        return True

    def _short_keys(self, knob_settings: Iterable[Setting]) -> None:
        for setting in knob_settings:
            if not isinstance(setting.value, Keys):
                continue
            short = [key for key in setting.value.values if len(key) < SHORT_KEY]
            if not short:
                continue
            told = "a key has" if len(short) == 1 else f"{len(short)} keys have"
            warning = f"{setting.name}: {told} less than {SHORT_KEY} characters, which can be guessed"
            if any(len(key) < SHORTEST_SECRET for key in short):
                warning += f"; one with less than {SHORTEST_SECRET} can't be masked in the log either"
            self.warnings.append(warning)

    def _tls(self, knobs: Knobs) -> None:
        if knobs.tls_key and not knobs.tls_cert:
            self.problems.append("SUPERVISOR_TLS_KEY is set without SUPERVISOR_TLS_CERT, such as /tls/tls.crt")
        elif knobs.tls_cert:
            import ssl  # noqa: PLC0415  # 10 ms that most starts need not pay

            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(knobs.tls_cert, knobs.tls_key)
            except OSError as error:
                why = error.strerror or error
                self.problems.append(
                    f"SUPERVISOR_TLS_CERT={knobs.tls_cert}, SUPERVISOR_TLS_KEY={knobs.tls_key or ''}: expected a "
                    f"certificate and its key in PEM, such as /tls/tls.crt and /tls/tls.key ({why})"
                )

    def _volume(self, knobs: Knobs) -> volumes.Volume | None:
        volume = within(DISK_PATIENCE, lambda: volumes.find(knobs.volume, self.environ))
        if knobs.volume and volume is None:
            self.problems.append(f"SUPERVISOR_VOLUME={knobs.volume}: expected a folder that is there, such as /data")
        if volume is not None and not volume.writable:
            self.warnings.append(
                f"{volume.path} is read-only: what is there is used; downloads and caches go to the container's disk"
            )
        return volume

    def _cache(self, knobs: Knobs, volume: volumes.Volume | None) -> Path:
        if knobs.cache_dir:
            return Path(knobs.cache_dir)
        if volume is not None and volume.writable:
            return volume.path / "supervisor"
        home = self.environ.get("XDG_CACHE_HOME") or os.path.join(self.environ.get("HOME", "/tmp"), ".cache")  # noqa: PTH118, S108
        return Path(home) / "vllm-supervisor"

    def _vllm(self, knobs: Knobs, cache: Path) -> tuple[Vllm | None, Catalogue | None]:
        try:
            vllm = find(knobs.vllm, self.environ.get("PATH"), cache)
            return vllm, catalogues.load(vllm, cache)
        except VllmError as error:
            self.problems.append(str(error))
            return None, None

    def _model(self, catalogue: Catalogue | None) -> tuple[Setting | None, bool]:
        found = self._candidates(("MODEL", *ALIASES["MODEL"]), "model")
        if self.arguments.model:
            found.insert(0, ("command line", self.arguments.model))
        found += self._vllm_config(catalogue)
        found += platform.model(self.environ)
        if not found:
            where = demo.platform(self.environ)
            if where is not None:
                self.problems.append(f"no model is named: set MODEL, such as MODEL=Qwen/Qwen3-0.6B ({where})")
                return None, False
            found = [("demo model: no model is named", str(demo.MODEL))]
        source, given = found[0]
        name = str(given)
        if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
            folder = Path(name).expanduser()
            if within(DISK_PATIENCE, folder.exists) is False:  # a disk that hangs is the launch's to wait for
                self.problems.append(
                    f"MODEL={name} ({source}): expected a folder that is there, or a name such as org/model"
                )
                return None, False
            name = str(folder)
        is_demo = within(DISK_PATIENCE, Path(name).resolve) == demo.MODEL
        return Setting("MODEL", name, source, self._lines(found[1:])), is_demo

    def _vllm_config(self, catalogue: Catalogue | None) -> list[tuple[str, Any]]:
        """What the file of vLLM's own --config says of the model; what it may not say is a problem."""
        found = self._candidates(("CONFIG", *ALIASES["CONFIG"]), "config") if catalogue else []
        if not found:
            return []
        source, path = found[0]
        file = config_file.read_vllm_config(str(path), source)
        self.problems += file.problems
        for key in file.content:
            if key in OWNED:
                self.problems.append(f"{file.label}: {key} can't be set there: {OWNED[key]}")
        return [(file.label, file.content["model"])] if file.content.get("model") else []

    def _raw(self, knob_settings: Iterable[Setting], catalogue: Catalogue) -> tuple[tuple[Option, Setting], ...]:
        (extra,) = [setting for setting in knob_settings if setting.name == "SUPERVISOR_EXTRA_ARGS"]
        last: dict[str, tuple[Given, str]] = {}
        for tokens, source in ((extra.value or (), extra.source), (self.arguments.vllm_args, "command line")):
            read = RawArguments(tokens, source, catalogue)
            self.problems += read.problems
            self.warnings += read.warnings
            last |= {given.name: (given, source) for given in read.given}
        return tuple((given.option, Setting(given.name, given.value, source)) for given, source in last.values())

    def _options(
        self, catalogue: Catalogue, defaults: Mapping[str, tuple[str, object]], raw: tuple[tuple[Option, Setting], ...]
    ) -> tuple[tuple[tuple[Option, Setting], ...], tuple[tuple[Option, Setting], ...]]:
        """The options of variables and files, less those that raw arguments override; and these, with what it was."""
        self._known([*catalogue.by_key, *self._also(catalogue), "model"], self.file.content)
        options = []
        # vLLM lets a part of a JSON option (`--x.y 1`) replace the whole of it; only `append` options add up.
        overriding: dict[str, tuple[str, ...]] = {option.variable: () for option, _ in raw if option.kind != "append"}
        for option in catalogue.by_key.values():
            if option.key == "model":
                continue
            found = self._given(option)
            if option.key in OWNED:
                for source, _ in found:
                    if source.removeprefix("environment ") not in OWNED_AND_READ:
                        self.warnings.append(f"{source} is not passed to vLLM: {OWNED[option.key]}")
                continue
            if option.key in defaults:
                found.append(defaults[option.key])
            if not found:
                continue
            if option.variable in overriding:
                overriding[option.variable] = self._lines(found)
                continue
            source, given = found[0]
            try:
                value = option.read(given)
            except BadValue as error:
                self._bad(option.variable, given, source, error)
                continue
            options.append((option, Setting(option.variable, value, source, self._lines(found[1:]))))
        told = tuple(
            (option, dataclasses.replace(setting, overrode=overriding.get(option.variable, ())))
            for option, setting in raw
        )
        return tuple(options), told

    def _spread(self, raw: tuple[tuple[Option, Setting], ...]) -> dict[str, str]:
        """How the user wants the model to be spread over GPUs."""
        found = {setting.name: str(setting.value) for _, setting in raw if setting.name in clusters.SPREAD}
        for variable in clusters.SPREAD:
            for _, given in self._candidates((variable,), variable.lower())[:1]:
                found.setdefault(variable, str(given))
        return found

    def _of_one_machine(
        self, options: tuple[tuple[Option, Setting], ...], *, told_so: bool
    ) -> tuple[tuple[Option, Setting], ...]:
        """Without what a launcher's variables say of several: vLLM would look for the others."""
        if not told_so and self.environ.get("NODE_RANK", "0").strip() not in ("", "0"):
            self.warnings.append(
                "NODE_RANK has no effect: one machine has no other rank; for several set NNODES (or NUM_NODES)"
            )
        return tuple(
            (option, setting)
            for option, setting in options
            if not (setting.name in clusters.OF_SEVERAL and setting.source.startswith("environment"))
        )

    def _given(self, option: Option) -> list[tuple[str, Any]]:
        """The sources of an option, under all its names, those left out that say 'not set' in words."""
        keys = [option.key, *map(catalogues.key_of, option.also)]
        found = []
        for key in keys:
            names = (key.upper(), *(ALIASES.get(key.upper(), ()) if key == option.key else ()))
            found += self._candidates(names, key)
        kept: list[tuple[str, Any]] = []
        if option.variable == "SPEC_METHOD":
            found += [(f"{source}={NGRAM}", "ngram") for source, given in self._drafts() if given == NGRAM]
        elif option.variable == "SPEC_MODEL":
            found = [(source, given) for source, given in found if given != NGRAM]
        for source, given in found:
            if (today := respelled(option, given)) is not None:
                self.warnings.append(f"{source}={given} is read as {today}, which is how vLLM has it today")
                given = today  # noqa: PLW2901  # the same, as it is written now
            auto = platform.computed(option.variable, given, self.environ)
            if option.variable in ZERO_MEANS_UNSET and str(given).strip() == "0":
                self.warnings.append(f"{source}=0 is taken for not set: {ZERO_MEANS_UNSET[option.variable]}")
            elif auto is not None:
                kept.append((f"{source}={given}", auto))
            elif not option.is_unset(given):
                kept.append((source, given))
        flag = SAGEMAKER + option.variable
        if self.environ.get(flag) == "" and option.kind in ("pair", "switch"):  # as those images read it
            kept.append((f"environment {flag}", True))
        if option.variable in self.derived:
            kept.append(self.derived[option.variable])
        if option.opposite:  # DISABLE_PREFIX_CACHING=true
            for source, given in self._candidates((option.opposite.upper(),), option.opposite):
                try:
                    kept.append((f"{source}={self._shown(given)}", not read_bool(given)))
                except BadValue as error:
                    self._bad(option.opposite.upper(), given, source, error)
        return kept

    def _drafts(self) -> list[tuple[str, Any]]:
        return self._candidates(("SPEC_MODEL", *ALIASES["SPEC_MODEL"]), "spec_model")

    def _also(self, catalogue: Catalogue) -> list[str]:
        """Keys that name an option in another way."""
        also = [catalogues.key_of(name) for option in catalogue.by_key.values() for name in option.also]
        return also + [option.opposite for option in catalogue.by_key.values() if option.opposite]

    def _unread(self, catalogue: Catalogue) -> None:
        """Variables that are set and that nothing reads, as far as they look meant for us."""
        self.warnings += typos.unread(self.environ, self.read, catalogue)
        port = self.environ.get("VLLM_PORT", "")
        if "://" in port:
            self.warnings.append(
                f"VLLM_PORT={port} is not passed to vLLM, which would fail on it: Kubernetes made it for a service "
                "named vllm; rename the service, or set enableServiceLinks: false"
            )
        elif port:
            self.warnings.append(
                "VLLM_PORT is passed to vLLM, for which it is the first port of its internal traffic; "
                "the port for clients is PORT"
            )

    def _platform(self, mode: str, options: Iterable[tuple[Option, Setting]], knob_settings: Iterable[Setting]) -> None:
        settings = (*(setting for _, setting in options), *knob_settings)
        values = {setting.name: (setting.value, setting.source) for setting in settings}
        self.warnings += platform.warnings(self.environ, mode, values)

    def _mode(self, asked: object) -> str:
        """http or queue. RunPod's load balancer may give its workers a queue's address as well."""
        if asked in ("http", "queue"):
            on_runpod = next((name for name in platform.RUNPODS if self.environ.get(name)), None)
            if asked == "queue" and on_runpod and not self.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
                self.problems.append(
                    f"SUPERVISOR_MODE=queue on RunPod ({on_runpod} is set) needs RUNPOD_WEBHOOK_GET_JOB, which RunPod "
                    "sets on queue endpoints alone: make it one, or serve HTTP with SUPERVISOR_MODE=http"
                )
            return str(asked)
        queue = self.environ.get("RUNPOD_WEBHOOK_GET_JOB") and not platform.balanced(self.environ)
        return "queue" if queue else "http"


def _normal_text(given: object) -> str:
    return str(given).lower() if isinstance(given, bool) else str(given)
