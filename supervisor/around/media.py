"""Warns that a model takes images and the like, which vLLM fetches from wherever a request says. That may be a host of
vLLM's own network, which its clients may not be in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterable

from supervisor.around import modalities
from supervisor.bounded import Call
from supervisor.engine.lifecycle import State
from supervisor.engine.run import Change, Observer, Run
from supervisor.settings.settings import Settings
from supervisor.weights.find import Weights

KIND_WORDS = {"image": "images", "video": "videos", "audio": "audio"}
REMEDY = "Set ALLOWED_MEDIA_DOMAINS to the hosts that they may come from (docs/operations.md)."


def unrestricted_kinds(settings: Settings, kinds: Iterable[str]) -> frozenset[str]:
    """Returns those of the kinds of media that the model takes that may be fetched from anywhere."""
    if settings.option("allowed_media_domains") or settings.option("language_model_only"):
        return frozenset()
    limits: dict[str, object] = {}
    for option, setting in (*settings.options, *settings.raw_options):
        if option.key == "limit_mm_per_prompt":
            option_kind = setting.name.partition(".")[2].partition(".")[0]  # --limit-mm-per-prompt.image 0
            limits |= _parse_limits({option_kind: setting.value} if option_kind else setting.value)
    return frozenset(kinds) - {kind for kind, count in limits.items() if count == 0}


def describe(kinds: Iterable[str]) -> str:
    """Returns what the warning says of these kinds, without the remedy."""
    words = [word for kind, word in KIND_WORDS.items() if kind in kinds]
    listing = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"the model takes {listing} by URL, and vLLM fetches them from any host, those of its own network included"


def _parse_limits(value: object) -> dict[str, object]:
    """Returns the limit of each kind. It is given as a number, or as an object that has it."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict):
        return {}
    limits = {kind: row.get("count") if isinstance(row, dict) else row for kind, row in value.items()}
    return {kind: int(row) if isinstance(row, str) and row.isdecimal() else row for kind, row in limits.items()}


class MediaNotice(Observer):
    """Looks when the engine starts, and again when it serves, until the model's config is there to be read: a model
    that is downloaded has none before that."""

    def __init__(self, settings: Settings, find_weights: Callable[[], Weights]) -> None:
        """`find_weights()` may hang: it is called in a thread."""
        self.log = logging.getLogger("supervisor")
        self.settings = settings
        self.find_weights = find_weights
        self.look_task: asyncio.Task[None] | None = None
        self.is_known = False

    def run_began(self, run: Run) -> None:
        self._start_look()

    def state_changed(self, change: Change) -> None:
        if change.state is State.READY:
            self._start_look()

    def _start_look(self) -> None:
        if not self.is_known and (self.look_task is None or self.look_task.done()):
            self.look_task = asyncio.ensure_future(self._warn_once())

    async def _warn_once(self) -> None:
        kinds = await Call(self._find_unrestricted)
        if kinds is None or self.is_known:
            return
        self.is_known = True
        if kinds:
            self.log.warning("%s. %s", describe(kinds), REMEDY)

    def _find_unrestricted(self) -> frozenset[str] | None:
        folder = self.find_weights().folder
        kinds = modalities.read_kinds(folder) if folder is not None else None
        return None if kinds is None else unrestricted_kinds(self.settings, kinds)
