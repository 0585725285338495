"""All that the user asked for: `gather` reads every source once, and frozen `Settings` come out, or one `SettingsError`
with a line for each thing to change. Nothing that was set is lost without a word: what has no effect is a warning."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from supervisor.bounded import within
from supervisor.secrets import Mask
from supervisor.settings import checks, config_file, models, options, platform, raw, typos
from supervisor.settings import cluster as clusters
from supervisor.settings import volume as volumes
from supervisor.settings.config_file import ConfigFile
from supervisor.settings.knobs import KNOBS, Keys, Knob, Knobs
from supervisor.settings.names import ALIASES, OURS, REMOVED, SAGEMAKER
from supervisor.settings.options import Options
from supervisor.settings.sources import Arguments, Asked, Found, Report, Setting, Source, beneath, environments, find
from supervisor.vllm import catalogue as catalogues
from supervisor.vllm import installed
from supervisor.vllm.catalogue import Catalogue, Option
from supervisor.vllm.installed import Vllm, VllmError

__all__ = ["Arguments", "Setting", "Settings", "SettingsError", "gather"]


class SettingsError(Exception):
    """Invalid settings: `problems` has one line for each, which says what to change. Masked."""

    def __init__(self, problems: list[str], warnings: Sequence[str] = ()) -> None:
        super().__init__("\n".join(problems))
        self.problems, self.warnings = problems, list(warnings)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the user asked for. Nothing reads the environment after this."""

    model: Setting
    mode: str  # http or queue
    options: Options
    raw: Options  # what is in `vllm_args`
    knobs: Knobs
    knob_settings: tuple[Setting, ...]  # and which file of settings was named, if any
    vllm_args: tuple[str, ...]
    vllm: Vllm
    is_demo: bool
    cluster: clusters.Cluster | None  # of machines that serve the model together
    volume: volumes.Volume | None
    cache: Path
    warnings: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)  # of vLLM's variables, and the hub's, as they were meant

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
    sources = [arguments.source, *environments(environ)]
    named = find(sources, "SUPERVISOR_CONFIG")
    report = Report(Mask(environ))
    file = config_file.read(*named[0], report) if named else config_file.read_unnamed(report)
    hidden = [str(file.knobs.get(knob.field, "")) for knob in KNOBS if knob.secret]
    report.mask.add([*hidden, *(part.strip() for text in hidden for part in text.split(","))])
    section = ((knob.variable, knob.field) for knob in KNOBS)
    sources += [{name: Found(f"{file.label} supervisor.{key}", file.knobs.get(key)) for name, key in section}]
    asked_mode = _knob(KNOBS[0], sources, file, report)  # the platform's defaults go by it
    balanced = environ.get("PORT_HEALTH") or environ.get("HEALTH_CHECK_PATH")  # RunPod may name a queue, too
    by_platform = "queue" if environ.get("RUNPOD_WEBHOOK_GET_JOB") and not balanced else "http"
    mode = str(asked_mode.value) if asked_mode.value in ("http", "queue") else by_platform
    defaults = platform.defaults(mode, environ)
    sources += [defaults]
    own = (asked_mode, *(_knob(knob, sources, file, report) for knob in KNOBS[1:]))
    knobs = Knobs(**{knob.field: setting.value for knob, setting in zip(KNOBS, own, strict=True)})
    _known({knob.field for knob in KNOBS}, file.knobs, file, report, "supervisor.")
    volume = within(models.DISK_PATIENCE, lambda: volumes.find(knobs.volume, environ))
    cache = _cache(knobs, volume, environ)
    try:
        vllm = installed.find(knobs.vllm, environ.get("PATH"), cache)
        catalogue = catalogues.load(vllm, cache)
    except VllmError as error:  # all else that is wrong is told as well
        report.problems.append(str(error))
        vllm, catalogue = Vllm((), "", None), Catalogue("", {})

    environ = report.cleaned(environ, catalogue)
    content = {key.upper(): Found(f"{file.label} {key}", file.content[key]) for key in file.content}
    users = [*environments(environ), {name: found for name, found in content.items() if name not in OURS}]
    in_raw: dict[str, tuple[Option, Setting]] = {}
    if catalogue.by_key:
        (extra,) = [setting for setting in own if setting.name == "SUPERVISOR_EXTRA_ARGS"]
        in_raw = raw.read(extra.value or (), extra.source, catalogue, report)
        in_raw |= raw.read(arguments.vllm_args, "command line", catalogue, report)
        _known(options.keys(catalogue), file.content, file, report)
        report.warnings += typos.unread(environ, _names(catalogue, environ), catalogue)
    asked_for = [{name: Found(setting.source, setting.value) for name, (_, setting) in in_raw.items()}, *users]
    vllms = find(asked_for, "CONFIG") if catalogue.by_key else []
    vllms_file = config_file.read_vllm_config(*vllms[0], report) if vllms else ConfigFile("")
    models_file = {"MODEL": Found(vllms_file.label, vllms_file.content.get("model"))}
    model = _model([arguments.source, *users, models_file, defaults], environ, report, vllm, catalogue)
    is_demo = model is not None and within(models.DISK_PATIENCE, Path(model.value).resolve) == models.DEMO
    in_file = options.of_vllms_file(vllms_file, catalogue, report)
    users += [clusters.derived(environ, asked_for)]
    users += [beneath("SUPERVISOR_ACCESS_LOG")] if knobs.access_log else []
    users += [beneath("demo model")] if is_demo else []
    chosen, given = options.resolve(catalogue, users, environ, report, raw=tuple(in_raw.values()))

    asked = Asked(environ, {setting.name: setting for _, setting in (*chosen, *given)}, vllm, catalogue)
    cluster = clusters.cluster(asked, report)
    mode = "http" if cluster is not None and cluster.headless else mode  # rank 0 takes the jobs
    if asked.number("NNODES") < 2:
        dropped = {name for name in clusters.OF_SEVERAL if asked[name].source.startswith("environment")}
        chosen = tuple((option, setting) for option, setting in chosen if setting.name not in dropped)
    found_out = {"mode": mode, "cluster": cluster and cluster.name, "volume": volume and volume.path}
    found_out["read-only volume"] = volume.path if volume and not volume.writable else None
    facts = (Setting(name, value, "") for name, value in found_out.items())
    every = (*(setting for _, setting in (*chosen, *given)), *own, *([model] if model else []), *facts)
    asked = replace(asked, settings=in_file | {each.name: each for each in every})
    report.problems += [line for rule in checks.PROBLEMS for line in rule(asked)]
    report.warnings += [line for rule in checks.WARNINGS for line in rule(asked)]
    problems, warnings = list(map(report.mask, report.problems)), list(map(report.mask, report.warnings))
    if problems or model is None:
        raise SettingsError(problems, warnings)
    config = [Setting("SUPERVISOR_CONFIG", file.label, source, report.overrode(named[1:])) for source, _ in named[:1]]
    return Settings(
        model=model, mode=mode, options=chosen, raw=given, knobs=knobs, knob_settings=(*config, *own),
        vllm_args=(*(knobs.extra_args or ()), *arguments.vllm_args), vllm=vllm, is_demo=is_demo, cluster=cluster,
        volume=volume, cache=cache, warnings=tuple(warnings), environ=dict(environ),
    )  # fmt: skip


def _known(known: Collection[str], given: Iterable[str], file: ConfigFile, report: Report, section: str = "") -> None:
    """A key of config.yaml that nothing reads is an error: the file was written for us."""
    for key in (key for key in given if key not in known):
        if key in REMOVED and not section:
            report.warnings.append(f"{file.label} {key} has no effect: {REMOVED[key]}")
        else:
            ours = OURS.get(key.upper(), "").lower().replace("supervisor_", "supervisor.", 1)
            hint = f"; use {ours}" if ours else typos.nearest(section + key, [section + name for name in known])
            report.problems.append(f"{file.label}: unknown key {section}{key}{hint}")


def _knob(knob: Knob, sources: Sequence[Source], file: ConfigFile, report: Report) -> Setting:
    found = find(sources, knob.variable, blank=knob.secret)
    found += [Found("default", knob.default)] if knob.default is not None else []
    where = f"{file.label} supervisor.{knob.field}"
    if found and knob.is_program and not file.is_named and found[0].source == where:
        found = []
        report.problems.append(  # a folder may be anybody's
            f"{where} is not obeyed, for it names a program and nobody named the file: "
            f"name it with --config (or SUPERVISOR_CONFIG), or set {knob.variable}"
        )
    own = {"secret": knob.secret, "template": knob.template, "command": knob.is_program}
    setting = report.setting(knob.variable, found, lambda given: knob.read(str(given)), **own) if found else None
    return setting or Setting(knob.variable, None, found[0].source if found else "default")


def _cache(knobs: Knobs, volume: volumes.Volume | None, environ: Mapping[str, str]) -> Path:
    if knobs.cache_dir:
        return Path(knobs.cache_dir)
    if volume is not None and volume.writable:
        return volume.path / "supervisor"
    home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/tmp", ".cache")  # noqa: PTH118, S108
    return Path(home) / "vllm-supervisor"


def _model(
    sources: Sequence[Source], environ: Mapping[str, str], report: Report, vllm: Vllm, catalogue: Catalogue
) -> Setting | None:
    found = find(sources, "MODEL")
    if not found and (where := models.forbids_demo(environ)):
        report.problems.append(f"no model is named: set MODEL, such as MODEL=Qwen/Qwen3-0.6B ({where})")
        return None
    found = found or [Found("demo model: no model is named", str(models.DEMO))]
    return report.setting("MODEL", found, lambda given: models.read(str(given), vllm, catalogue, environ))


def _names(catalogue: Catalogue, environ: Mapping[str, str]) -> set[str]:
    """The variables that something here reads."""
    ours = {"MODEL", "SUPERVISOR_CONFIG", *(knob.variable for knob in KNOBS), *map(str.upper, options.keys(catalogue))}
    ours |= {alias for name in ours & ALIASES.keys() for alias in ALIASES[name]}
    prefixes = ("", SAGEMAKER) if any(name.startswith(SAGEMAKER) for name in environ) else ("",)
    return {"HF_TOKEN", "SUPERVISOR_IMAGE"} | {prefix + name for prefix in prefixes for name in ours}
