"""Tells that a model takes images and the like, which vLLM fetches from wherever a request says: from the network that
it is in, too, which its clients may not be.
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
from supervisor.settings import config_file
from supervisor.settings.settings import Settings
from supervisor.settings.sources import Report
from supervisor.weights.find import Weights

WORDS = {"image": "images", "video": "videos", "audio": "audio"}
REMEDY = "Set ALLOWED_MEDIA_DOMAINS to the hosts that they may come from (docs/operations.md)."


def unrestricted(settings: Settings, kinds: Iterable[str]) -> frozenset[str]:
    """Of the kinds of media that the model takes: those that may be fetched from anywhere."""
    name = settings.option("config")
    file = config_file.read_vllm_config("", name, Report(settings.mask)).typed_content if name else {}

    def value(key: str) -> object:
        return settings.option(key) or file.get(key)

    if value("allowed_media_domains") or value("language_model_only"):
        return frozenset()
    limits = _counts(file.get("limit_mm_per_prompt"))
    for option, setting in (*settings.options, *settings.raw_options):
        if option.key == "limit_mm_per_prompt":
            part = setting.name.partition(".")[2].partition(".")[0]  # --limit-mm-per-prompt.image 0
            limits |= _counts({part: setting.value} if part else setting.value)
    return frozenset(kinds) - {kind for kind, count in limits.items() if count == 0}


def text(kinds: Iterable[str]) -> str:
    """What is told of these, the remedy apart."""
    words = [word for kind, word in WORDS.items() if kind in kinds]
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"the model takes {listed} by URL, and vLLM fetches them from any host, those of its own network included"


def _counts(given: object) -> dict[str, object]:
    """The limit of each kind: a number, or an object that has it."""
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    if not isinstance(given, dict):
        return {}
    rows = {kind: row.get("count") if isinstance(row, dict) else row for kind, row in given.items()}
    return {kind: int(row) if isinstance(row, str) and row.isdecimal() else row for kind, row in rows.items()}


class MediaTold(Observer):
    """Looks when the engine starts, and again when it serves, until the model's config is there to be read: a model
    that is downloaded has none before."""

    def __init__(self, settings: Settings, weights: Callable[[], Weights]) -> None:
        """`weights()` may hang: it is asked in a thread."""
        self.log = logging.getLogger("supervisor")
        self.settings = settings
        self.weights = weights
        self.looking: asyncio.Task[None] | None = None
        self.known = False

    def began(self, run: Run) -> None:
        self._look()

    def changed(self, change: Change) -> None:
        if change.state is State.READY:
            self._look()

    def _look(self) -> None:
        if not self.known and (self.looking is None or self.looking.done()):
            self.looking = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        found = await Call(self._found)
        if found is None or self.known:
            return
        self.known = True
        if found:
            self.log.warning("%s. %s", text(found), REMEDY)

    def _found(self) -> frozenset[str] | None:
        folder = self.weights().folder
        kinds = modalities.read(folder) if folder is not None else None
        return None if kinds is None else unrestricted(self.settings, kinds)
