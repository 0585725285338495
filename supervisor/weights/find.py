"""Finds weights: they are a folder, or in one of some caches, which are looked through in order, or come from the hub.

Nothing is asked of the network here. A snapshot that lacks something is passed over, and a rejection says so.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from supervisor.weights.snapshot import COMMIT_HASH, PATTERNS, find_fault

REPOSITORY_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# It names one of a repository's many models, which vLLM's GGUF plugin knows by its quantization; or a file.
GGUF_NAME = re.compile(r"[\w.-]+/[\w.-]+:[\w.-]+|.+\.gguf")
TRUE_WORDS = ("1", "true", "yes", "on")


class Place(NamedTuple):
    """A cache as the hub's client lays it out. `is_pinned`: whoever filled it chose what is served, and nobody asks the
    hub whether there is something newer."""

    name: str
    cache: Path
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """`source` says in words where they are. vLLM is to serve `folder`, where that is known. With `needs_download` they
    are to be fetched before, or at least asked for. `rejections` tell what was found and not taken, and why. `is_gguf`
    ones can't be served by a vLLM without the plugin."""

    source: str
    folder: Path | None = None
    needs_download: bool = False
    rejections: tuple[str, ...] = ()
    is_gguf: bool = False


def find(
    model: str, revision: str | None, load_format: str, places: Iterable[Place], environ: Mapping[str, str]
) -> Weights:
    """Returns where the weights are; for that it reads a few small files of each place."""
    is_gguf = load_format == "gguf" or GGUF_NAME.fullmatch(model) is not None
    if os.path.exists(model):  # noqa: PTH110  # it is false, too, where the name is too long or may not be looked at
        return Weights(f"the folder {model}", Path(model), is_gguf=is_gguf)
    if not REPOSITORY_NAME.fullmatch(model) or is_gguf or environ.get("VLLM_USE_MODELSCOPE", "").lower() in TRUE_WORDS:
        return Weights("left to vLLM", is_gguf=is_gguf)  # s3://..., another hub
    rejections, is_known_format = list[str](), load_format in PATTERNS
    for place in places:
        snapshot = find_snapshot(place.cache, model, revision)
        if snapshot is None or not (is_known_format or place.is_pinned):
            continue
        if (fault := find_fault(snapshot, load_format)) is not None:
            rejections.append(f"{model} is {place.name} ({snapshot}), but not whole: {fault}")
            continue
        needs_download = not (place.is_pinned or is_offline(environ) or COMMIT_HASH.fullmatch(revision or ""))
        return Weights(f"{place.name}, {snapshot}", snapshot, needs_download, tuple(rejections))
    if not is_known_format:
        return Weights(f"left to vLLM, whose {load_format} has them in a way of its own")
    if is_offline(environ) and rejections:  # vLLM may get along with what is there
        return Weights("left to vLLM, for the hub may not be asked", None, False, tuple(rejections))
    return Weights("the hub", None, True, tuple(rejections))  # the downloader says at once where it is offline


def is_offline(environ: Mapping[str, str]) -> bool:
    """Returns whether the hub's client may not ask the hub, by its own rule."""
    return (environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE", "")).lower() in TRUE_WORDS


def find_snapshot(cache: Path, model: str, revision: str | None) -> Path | None:
    """Returns the folder of that revision (main, if none is asked for), where the cache has it.

    RunPod writes some folders' names in small letters; the exact one is preferred.
    """
    repository = cache / f"models--{model.replace('/', '--')}"
    with contextlib.suppress(OSError):  # somebody else's folder, too long a name
        if not repository.is_dir():
            repository = {path.name.lower(): path for path in cache.iterdir()}.get(repository.name.lower(), repository)
        snapshots, commit = repository / "snapshots", revision if COMMIT_HASH.fullmatch(revision or "") else None
        with contextlib.suppress(OSError, ValueError):
            commit = (repository / "refs" / (revision or "main")).read_text().strip()
        if commit or not revision:
            folders: Iterable[Path] = [snapshots / commit] if commit else snapshots.iterdir()
            return max(filter(Path.is_dir, folders), key=lambda path: path.stat().st_mtime, default=None)
    return None
