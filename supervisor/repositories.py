"""The hub's repositories that the settings name: the model, and its companions, which vLLM reads beside it. They are
found here, and vLLM's options get their folders in the place of their names.

A tokenizer of its own, a draft model and adapters are such companions, found and fetched as the model is. A repository
that vLLM's raw arguments name is left to vLLM.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from supervisor.settings.knobs import read_path
from supervisor.settings.settings import Settings
from supervisor.settings.volume import Volume
from supervisor.vllm.values import json_object
from supervisor.weights import find, snapshot

# RunPod's own name for the cache on a volume, so that its cached models and what a worker downloads lie in one.
HUB_FOLDER = "huggingface-cache"
# The image keeps weights here that were baked in (Dockerfile).
BAKED_CACHE = Path("/opt/weights/hub")
DOWNLOAD_PROGRAM = Path(find.__file__).with_name("download.py")
# The downloading program puts a folder in the place of this word, and a companion's in that of `{weights:1}`, ...
PLACEHOLDER = "{weights}"
# After so many seconds without a byte a download begins again, where SUPERVISOR_STALL_TIMEOUT does not say less.
STALL_TIMEOUT = 60.0
# These options may name another repository, in which vLLM looks by itself.
UNRESOLVED_OPTIONS = ("hf_config_path", "generation_config")
# vLLM's methods of drafting without a repository: what is called their model is none, or a class of the user's.
BUILT_IN_DRAFTS = ("ngram", "[ngram]", "ngram_gpu", "suffix", "extract_hidden_states", "custom_class")

# Returns what is put in the place of a repository, by its name, revision and format.
Swap = Callable[[str, str | None, str], str]


@dataclass(frozen=True, slots=True)
class Repository:
    """`setting` is what names it. `placeholder` stands for it on a command line until it is fetched."""

    name: str
    revision: str | None
    load_format: str
    setting: str
    placeholder: str
    weights: find.Weights

    def argument(self, *, can_fetch: bool) -> str:
        """Returns what vLLM gets on its command line in the place of the repository's name."""
        if self.weights.needs_download and can_fetch:
            return self.placeholder
        folder = self.weights.folder
        return self.name if folder is None or folder == Path(self.name) else str(folder)


def find_model(settings: Settings) -> Repository:
    name, revision = str(settings.model.value), settings.option("revision")
    load_format = _load_format(settings)
    return Repository(name, revision, load_format, "MODEL", PLACEHOLDER, _locate(settings, name, revision, load_format))


def find_weights(settings: Settings) -> find.Weights:
    return find_model(settings).weights


def find_companions(settings: Settings) -> tuple[list[Repository], Settings]:
    """Returns the model's companions, and the settings with what stands for each of them."""
    others: list[Repository] = []
    can_fetch = bool(python(settings))

    def swap(setting: str, name: str, revision: str | None, load_format: str) -> str:
        if (name, revision) == (settings.model.value, settings.option("revision")):
            return find_model(settings).argument(can_fetch=can_fetch)
        weights = _locate(settings, name, revision, load_format)
        others.append(Repository(name, revision, load_format, setting, f"{{weights:{len(others) + 1}}}", weights))
        return others[-1].argument(can_fetch=can_fetch)

    options = []
    for option, setting in settings.options:
        rewrite = REWRITERS.get(option.key)
        value = rewrite(setting.value, settings, partial(swap, option.variable)) if rewrite else setting.value
        options.append((option, dataclasses.replace(setting, value=value)))
    in_file = settings.in_file - {*map(str.upper, REWRITERS)}  # on the command line a folder beats the name there
    return others, dataclasses.replace(settings, options=tuple(options), in_file=in_file)


def needs_hub(settings: Settings, companions: list[Repository]) -> bool:
    """Returns whether vLLM has something to ask the hub even where it is given folders."""
    has_raw = any(option.key in (*REWRITERS, "hf_overrides") for option, _ in settings.raw_options)
    has_override = any(name in str(settings.option("hf_overrides")) for name in snapshot.FILES["elsewhere"])
    has_names = has_raw or has_override or any(settings.option(key) for key in UNRESOLVED_OPTIONS)
    may_load_more = bool(settings.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"))
    has_unknown = any(not (each.weights.needs_download or each.weights.folder) for each in companions)
    folders = [each.weights.folder for each in companions if each.weights.folder and not each.weights.needs_download]
    return has_names or has_unknown or may_load_more or not all(map(snapshot.is_self_contained, folders))


def python(settings: Settings) -> tuple[str, ...]:
    """Returns the command of vLLM's Python; it is empty where that is not known."""
    return settings.vllm.python or ()


def fetch_command(settings: Settings, repositories: list[Repository], *, offline: bool = False) -> tuple[str, ...]:
    """Returns the command that downloads these in vLLM's environment. `offline`: what it becomes asks no hub."""
    ignored = settings.option("ignore_patterns") or ()  # vLLM has it hold for weights, and not for adapters'
    rows = [
        {
            "repo": each.name,
            "revision": each.revision,
            "load_format": each.load_format,
            "place": each.placeholder,
            "setting": each.setting,
            "have": each.weights.folder and str(each.weights.folder),
            "gguf": each.weights.is_gguf,
            "ignore": [f"{text}*" if text[-1:] == "/" else text for text in ignored if each.load_format != "lora"],
        }
        for each in repositories
    ]
    arguments = {
        "repositories": rows,
        "cache": read_path(settings.option("download_dir") or "") or None,
        "stall": min(STALL_TIMEOUT, settings.knobs.stall_timeout or STALL_TIMEOUT),
        "offline": offline,
    }
    return (*python(settings), str(DOWNLOAD_PROGRAM), json.dumps(arguments))


def hub_env(volume: Volume | None, environ: Mapping[str, str], folder: str) -> dict[str, str]:
    """Returns variables for the hub's client, where the user set none. `folder` belongs to this start alone."""
    variables = {"HF_XET_HIGH_PERFORMANCE": "1"}
    has_own_cache = any(environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))
    if volume is not None and volume.is_writable and not has_own_cache:
        # Xet keeps chunks of what it downloads: beside the files themselves they would be written to the network twice.
        variables |= {"HF_HOME": str(volume.path / HUB_FOLDER), "HF_XET_CACHE": os.path.join(folder, "xet")}  # noqa: PTH118
    return {name: value for name, value in variables.items() if not environ.get(name)}


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Returns where the hub's client keeps what it downloads, by its own rules."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return expand(environ[name], environ)
    home = environ.get("HF_HOME")
    if not home:
        cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/tmp", ".cache")  # noqa: PTH118, S108
        home = os.path.join(cache, "huggingface")  # noqa: PTH118
    return expand(home, environ) / "hub"


def expand(path: str, environ: Mapping[str, str]) -> Path:
    """Returns a path as the hub's client reads it: with the home, and with variables."""
    return Path(Template(read_path(path)).safe_substitute(environ))


def list_places(environ: Mapping[str, str], disk: Path | None, download_dir: str | None = None) -> list[find.Place]:
    """Lists the image; the volume, where RunPod's cached models lie as well; and the hub's own cache."""
    places = [find.Place("baked into the image", BAKED_CACHE, is_pinned=True)]
    if disk is not None:
        places.append(find.Place("on the volume", disk / HUB_FOLDER / "hub", is_pinned=True))
    cache = Path(read_path(download_dir)) if download_dir else hub_cache(environ)
    if all(place.cache != cache for place in places):
        places.append(find.Place("in the hub's cache", cache, is_pinned=False))
    return places


def _load_format(settings: Settings) -> str:
    return str(settings.option("load_format") or "auto").lower()


def _locate(settings: Settings, name: str, revision: str | None, load_format: str) -> find.Weights:
    environ = {**hub_env(settings.volume, settings.environ, ""), **settings.environ}
    caches = list_places(environ, settings.volume.path if settings.volume else None, settings.option("download_dir"))
    return find.find(name, revision, load_format, caches, environ)


# For each option that names repositories: a function that returns its value with what `swap` says in their place.


def _rewrite_draft(value: Any, settings: Settings, swap: Swap, revision: str | None = None) -> str:
    """Returns what stands for a draft model. Without a method vLLM takes a dotted name for a class of the user's."""
    name, config = str(value), json_object(settings.option("speculative_config")) or {}
    method = settings.option("spec_method") or config.get("method")
    is_class = "." in name and all(map(str.isidentifier, name.split(".")))
    if method in BUILT_IN_DRAFTS or (not method and (is_class or name in BUILT_IN_DRAFTS)):
        return name
    return swap(name, revision, _load_format(settings))


def _rewrite_speculative(value: Any, settings: Settings, swap: Swap) -> Any:
    content = json_object(value) or {}
    model = content.get("model")
    draft = _rewrite_draft(model, settings, swap, content.get("revision")) if isinstance(model, str) else model
    return value if draft == model else json.dumps(content | {"model": draft})


def _rewrite_adapters(value: Any, _settings: Settings, swap: Swap) -> Any:
    def swap_path(text: str) -> str:
        content = json_object(text) or {}
        if isinstance(content.get("path"), str):
            return json.dumps(content | {"path": swap(content["path"], None, "lora")})
        name, equals, path = text.partition("=")
        return f"{name}={swap(path, None, 'lora')}" if equals and not content else text

    return tuple(map(swap_path, map(str, value)))


REWRITERS: dict[str, Callable[[Any, Settings, Swap], Any]] = {
    "tokenizer": lambda value, settings, swap: swap(
        str(value), settings.option("tokenizer_revision") or settings.option("revision"), "tokenizer"
    ),
    "spec_model": _rewrite_draft,
    "speculative_config": _rewrite_speculative,
    "lora_modules": _rewrite_adapters,
    "default_mm_loras": lambda value, _, swap: json.dumps(
        {medium: swap(str(path), None, "lora") for medium, path in (json_object(value) or {}).items()}
    ),
}
