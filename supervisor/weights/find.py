"""Where the model's weights are, in this order: a folder, the image, RunPod's cached models and the volume, the hub's
own cache; else they come from the hub.

Nothing is asked of the network here. A snapshot that lacks something is passed over, and said to be.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.weights.snapshot import lacking

# Where the image keeps weights that were baked in (Dockerfile).
BAKED = Path("/opt/weights/hub")
# On RunPod both its cached models and what a worker leaves on a network volume lie there.
RUNPOD = "huggingface-cache"
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TRUE = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Place:
    """A cache as the hub's client lays it out. `settled`: whoever filled it chose what is served, and nobody asks the
    hub whether there is something newer."""

    name: str
    cache: Path
    settled: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """`source`: in words. `folder`: what vLLM is to serve, where it is known. `download`: they are to be fetched, or at
    least asked for, before that. `passed_over`: what was found and not taken, and why."""

    source: str
    folder: Path | None = None
    download: bool = False
    passed_over: tuple[str, ...] = field(default=())


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where the hub's client keeps what it downloads, by its own rules."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    home = environ.get("HF_HOME")
    if not home:
        cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "/tmp"), ".cache")  # noqa: PTH118, S108
        home = os.path.join(cache, "huggingface")  # noqa: PTH118
    return Path(home).expanduser() / "hub"


def places(environ: Mapping[str, str], volume: Path | None, download_dir: str | None = None) -> list[Place]:
    found = [Place("baked into the image", BAKED, settled=True)]
    if volume is not None:
        found.append(Place("on the volume", volume / RUNPOD / "hub", settled=True))
    cache = Path(download_dir) if download_dir else hub_cache(environ)
    if all(place.cache != cache for place in found):
        found.append(Place("in the hub's cache", cache, settled=False))
    return found


def find(
    model: str, revision: str | None, load_format: str, among: Iterable[Place], environ: Mapping[str, str]
) -> Weights:
    """Reads a few small files of each place."""
    if _exists(Path(model)):
        return Weights(f"the folder {model}", Path(model))
    if not REPOSITORY.fullmatch(model) or environ.get("VLLM_USE_MODELSCOPE", "").lower() in TRUE:
        return Weights("left to vLLM")  # s3://..., org/name:Q4_K_M, another hub
    passed_over = []
    offline = (environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE", "")).lower() in TRUE
    for place in among:
        snapshot = find_snapshot(place.cache, model, revision)
        if snapshot is None:
            continue
        fault = lacking(snapshot, load_format)
        if fault is not None:
            passed_over.append(f"{model} is {place.name} ({snapshot}), but not whole: {fault}")
            continue
        asked = not (place.settled or offline or COMMIT.fullmatch(revision or ""))
        return Weights(f"{place.name}, {snapshot}", snapshot, asked, tuple(passed_over))
    if offline and passed_over:  # vLLM may get along with what is there
        return Weights("left to vLLM, for the hub may not be asked", None, False, tuple(passed_over))
    return Weights("the hub", None, True, tuple(passed_over))  # offline: to be told so at once


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name, or in somebody else's folder
        return False


def find_snapshot(cache: Path, model: str, revision: str | None) -> Path | None:
    """The folder of that revision (main, if none is asked for), where the cache has it.

    RunPod writes some folders' names in small letters; the exact one is preferred.
    """
    with contextlib.suppress(OSError):  # somebody else's folder, too long a name
        return _find_snapshot(cache, model, revision)
    return None


def _find_snapshot(cache: Path, model: str, revision: str | None) -> Path | None:
    repository = cache / f"models--{model.replace('/', '--')}"
    if not repository.is_dir():
        entries = {entry.name.lower(): entry.path for entry in os.scandir(cache)}
        found = entries.get(repository.name.lower())
        if found is None:
            return None
        repository = Path(found)
    snapshots = repository / "snapshots"
    try:
        commit = (repository / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        commit = revision if revision and COMMIT.fullmatch(revision) else ""
    if commit:
        return snapshots / commit if (snapshots / commit).is_dir() else None
    if revision:
        return None
    there = [path for path in snapshots.iterdir() if path.is_dir()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)
