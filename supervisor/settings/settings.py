"""`gather` reads every source once, and returns frozen `Settings`, all that the user asked for, or raises one
`SettingsError` with a line for each thing to change. Nothing set is lost silently: what has no effect is a warning."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from supervisor.bounded import try_bounded
from supervisor.secrets import SECRET_NAME, Mask
from supervisor.settings import checks, config_file, models, options, platform, raw, typos
from supervisor.settings import cluster as clusters
from supervisor.settings import volume as volumes
from supervisor.settings.config_file import ConfigFile
from supervisor.settings.knobs import KNOBS, Keys, Knob, Knobs
from supervisor.settings.names import ALIASES, BY_ALIAS, MESSAGES, REMOVED, SM_PREFIX
from supervisor.settings.options import Options
from supervisor.settings.sources import Arguments, Entry, Facts, Report, Setting, Source, env_sources, find_all, presets
from supervisor.vllm import catalogue as catalogues
from supervisor.vllm import installed
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.installed import Vllm, VllmError

__all__ = ["Arguments", "Setting", "Settings", "SettingsError", "gather"]


class SettingsError(Exception):
    """The settings are invalid: `problems` has a masked line for each fault, which says what to change."""

    def __init__(self, problems: list[str], warnings: Sequence[str] = ()) -> None:
        super().__init__("\n".join(problems))
        self.problems, self.warnings = problems, list(warnings)


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings hold everything the user asked for. Nothing reads the environment after they are made."""

    model: Setting
    mode: str  # http or queue
    options: Options
    raw_options: Options  # those in `vllm_args`, and what of vLLM's own file no other option can beat
    in_file: frozenset[str]  # variables of `options` that vLLM itself reads there
    knobs: Knobs
    knob_settings: tuple[Setting, ...]  # and which file of settings was named, if any
    vllm_args: tuple[str, ...]
    vllm: Vllm
    is_demo: bool
    cluster: clusters.Cluster | None  # of machines that serve the model together
    volume: volumes.Volume | None
    cache: Path
    warnings: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)  # with vLLM's variables, and the hub's, as they were meant

    def is_set(self, variable: str) -> bool:
        """Returns whether the user set one of the supervisor's own settings."""
        return any(knob.name == variable and not knob.source.startswith("default") for knob in self.knob_settings)

    def option(self, key: str) -> Any:
        """Returns the value of one of vLLM's options, by its key, and None where nobody set it."""
        values = [setting.value for option, setting in (*self.options, *self.raw_options) if option.key == key]
        return values[-1] if values else None

    @property
    def mask(self) -> Mask:
        return Mask(self.environ, [key for keys in self.keys for key in keys.values])

    @property
    def keys(self) -> tuple[Keys, Keys]:
        """Returns the keys of clients, and those of administrators."""
        return self.knobs.api_keys or Keys(), self.knobs.admin_keys or Keys()


def gather(arguments: Arguments, environ: Mapping[str, str]) -> Settings:
    """Reads every source. Raises SettingsError with all problems at once."""
    knob_sources = [arguments.source, *env_sources(environ)]
    files = find_all(knob_sources, "SUPERVISOR_CONFIG")
    report = Report(Mask(environ))
    file = config_file.read(*files[0], report) if files else config_file.read_unnamed(report)
    secrets = [str(file.knobs.get(knob.field, "")) for knob in KNOBS if SECRET_NAME.search(knob.variable)]
    report.mask.add([*secrets, *(part.strip() for text in secrets for part in text.split(","))])
    knob_names = ((knob.variable, knob.field) for knob in KNOBS)
    knob_sources += [{name: Entry(f"{file.label} supervisor.{key}", file.knobs.get(key)) for name, key in knob_names}]
    mode_setting = _read_knob(KNOBS[0], knob_sources, file, report)  # the platform's defaults depend on it
    has_health_check = any(environ.get(name, "").strip() for name in ("PORT_HEALTH", "HEALTH_CHECK_PATH"))
    platform_mode = "queue" if environ.get("RUNPOD_WEBHOOK_GET_JOB") and not has_health_check else "http"
    mode = str(mode_setting.value) if mode_setting.value in ("http", "queue") else platform_mode
    knob_sources += [platform_defaults := platform.defaults(mode, environ)]
    knob_settings = (mode_setting, *(_read_knob(knob, knob_sources, file, report) for knob in KNOBS[1:]))
    knobs = Knobs(**{knob.field: setting.value for knob, setting in zip(KNOBS, knob_settings, strict=True)})
    _check_keys({knob.field for knob in KNOBS}, file.knobs, file, report, "supervisor.")
    volume = try_bounded(models.DISK_PATIENCE, lambda: volumes.find(knobs.volume, environ))
    cache = _cache_folder(knobs, volume, environ)
    try:
        vllm = installed.find(knobs.vllm, environ.get("PATH"), cache)
        catalogue = catalogues.load(vllm, cache)
    except VllmError as error:  # everything else that is wrong is told as well
        report.problems.append(str(error))
        vllm, catalogue = Vllm((), "", None), Catalogue("", {})

    environ = report.clean_environment(environ, catalogue)
    entries = {key.upper(): Entry(f"{file.label} {key}", file.content[key]) for key in file.content}
    sources = [*env_sources(environ), {name: entry for name, entry in entries.items() if name not in BY_ALIAS}]
    vllm_args, raw_by_name = (*(knobs.extra_args or ()), *arguments.vllm_args), raw.ByName()
    if vllm_args.count("--config") > 1:
        report.problems.append("--config stands twice among vLLM's arguments, and vLLM takes one file: leave one out")
    if catalogue.by_key:
        (extra_args,) = [setting for setting in knob_settings if setting.name == "SUPERVISOR_EXTRA_ARGS"]
        raw_by_name = raw.read(extra_args.value or (), extra_args.source, catalogue, report)
        raw_by_name |= raw.read(arguments.vllm_args, "command line", catalogue, report)
        _check_keys(options.keys(catalogue), file.content, file, report)
        report.warnings += typos.check_unread(environ, _known_names(catalogue, environ), catalogue)
    raw_source: Source = {name: Entry(each.source, each.value) for name, (_, each) in raw_by_name.items()}
    vllm_configs = find_all([raw_source, *sources], "CONFIG") if catalogue.by_key else []
    vllm_file = config_file.read_vllm_config(*vllm_configs[0], report) if vllm_configs else ConfigFile("")
    model_source = {"MODEL": Entry(vllm_file.label, vllm_file.content.get("model"))}
    model = _read_model([arguments.source, *sources, model_source, platform_defaults], environ, report, vllm, catalogue)
    is_demo = model is not None and try_bounded(models.DISK_PATIENCE, Path(model.value).resolve) == models.DEMO_MODEL
    file_options = raw.read_vllm_file(vllm_file, catalogue, report)
    # vLLM puts parts of objects (`x.y: 1`) behind all that is whole, wherever they stand, and adds up what adds up.
    raw_by_name = {name: row for name, row in file_options.items() if name.startswith("-")} | raw_by_name
    file_source = {name: Entry(each.source, each.value) for name, (_, each) in file_options.items()}
    sources += [file_source, clusters.derive(environ, [raw_source, *sources, file_source])]
    sources += [presets("SUPERVISOR_ACCESS_LOG")] if knobs.access_log else []
    sources += [presets("demo model")] if is_demo else []
    winners, raw_options = options.resolve(catalogue, sources, environ, report, raw_options=tuple(raw_by_name.values()))

    facts = Facts(environ, {setting.name: setting for _, setting in (*winners, *raw_options)}, vllm, catalogue)
    cluster = clusters.find_cluster(facts, report)
    mode = "http" if cluster is not None and cluster.is_headless else mode  # rank 0 takes the jobs
    if facts.number("NNODES") < 2:
        dropped_names = {name for name in clusters.MULTI_NODE_VARIABLES if facts[name].source.startswith("environment")}
        winners = tuple((option, setting) for option, setting in winners if setting.name not in dropped_names)
    values = {"mode": mode, "cluster": cluster and cluster.name, "volume": volume and volume.path}
    values["read-only volume"] = volume.path if volume and not volume.is_writable else None
    findings = (Setting(name, value, "") for name, value in values.items())
    settings = (*(each for _, each in (*winners, *raw_options)), *knob_settings, *([model] if model else []), *findings)
    facts = replace(facts, settings={each.name: each for each in settings})
    report.problems += [line for rule in checks.PROBLEMS for line in rule(facts)]
    report.warnings += [line for rule in checks.WARNINGS for line in rule(facts)]
    problems, warnings = list(map(report.mask, report.problems)), list(map(report.mask, report.warnings))
    if problems or model is None:
        raise SettingsError(problems, warnings)
    config = [Setting("SUPERVISOR_CONFIG", file.label, source, report.describe(files[1:])) for source, _ in files[:1]]
    in_file = frozenset(setting.name for _, setting in winners if setting.source.startswith(f"{vllm_file.label} "))
    return Settings(
        model=model, mode=mode, options=winners, raw_options=raw_options, in_file=in_file, knobs=knobs, vllm=vllm,
        knob_settings=(*config, *knob_settings), vllm_args=vllm_args, is_demo=is_demo, cluster=cluster, volume=volume,
        cache=cache, warnings=tuple(warnings), environ=dict(environ),
    )  # fmt: skip


def _check_keys(names: Collection[str], keys: Iterable[str], file: ConfigFile, report: Report, part: str = "") -> None:
    """Reports a key of config.yaml that nothing reads. It is an error, since the file was written for us."""
    for key in (key for key in keys if key not in names):
        if key in REMOVED and not part:
            report.warnings.append(f"{file.label} {key} has no effect: {REMOVED[key]}")
        else:
            ours = BY_ALIAS.get(key.upper(), "").lower().replace("supervisor_", "supervisor.", 1)
            hint = f"; use {ours}" if ours else typos.nearest_hint(part + key, [part + name for name in names])
            report.problems.append(f"{file.label}: unknown key {part}{key}{hint}")


def _read_knob(knob: Knob, sources: Sequence[Source], file: ConfigFile, report: Report) -> Setting:
    entries = find_all(sources, knob.variable, keep_blanks=knob.is_secret)
    entries += [Entry("default", knob.default)] if knob.default is not None else []
    file_source = f"{file.label} supervisor.{knob.field}"
    if entries and knob.is_program and not file.is_named and entries[0].source == file_source:
        entries = []  # the current folder may be anybody's
        report.problems.append(MESSAGES["a program"].format(source=file_source, variable=knob.variable))
    flags = {"secret": knob.is_secret, "template": knob.is_template, "command": knob.is_program}
    setting = report.read(knob.variable, entries, lambda value: knob.read(str(value)), **flags) if entries else None
    return setting or Setting(knob.variable, None, entries[0].source if entries else "default")


def _cache_folder(knobs: Knobs, volume: volumes.Volume | None, environ: Mapping[str, str]) -> Path:
    if knobs.cache_dir:
        return Path(knobs.cache_dir)
    if volume is not None and volume.is_writable:
        return volume.path / "supervisor"
    cache_home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/tmp", ".cache")  # noqa: PTH118, S108
    return Path(cache_home) / "vllm-supervisor"


def _read_model(
    sources: Sequence[Source], environ: Mapping[str, str], report: Report, vllm: Vllm, catalogue: Catalogue
) -> Setting | None:
    entries = find_all(sources, "MODEL")
    if not entries and (obstacle := models.find_demo_obstacle(environ)):
        report.problems.append(f"no model is named: set MODEL, such as MODEL=Qwen/Qwen3-0.6B ({obstacle})")
        return None
    entries = entries or [Entry("demo model: no model is named", str(models.DEMO_MODEL))]
    return report.read("MODEL", entries, lambda value: models.read(str(value), vllm, catalogue, environ))


def _known_names(catalogue: Catalogue, environ: Mapping[str, str]) -> set[str]:
    """Returns the variables that something here reads."""
    names = {"MODEL", "SUPERVISOR_CONFIG", *(knob.variable for knob in KNOBS), *map(str.upper, options.keys(catalogue))}
    names |= {alias for name in names & ALIASES.keys() for alias in ALIASES[name]}
    prefixes = ("", SM_PREFIX) if any(name.startswith(SM_PREFIX) for name in environ) else ("",)
    return {"HF_TOKEN", "SUPERVISOR_IMAGE", "SUPERVISOR_DEMO"} | {each + name for each in prefixes for name in names}
