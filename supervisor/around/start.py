"""Shows a start: below the log of a terminal while it lasts (terminal.py), as one line elsewhere. Then it says what to
do once it serves.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence

from supervisor import listen
from supervisor.engine.lifecycle import CLOSED_STATES, State
from supervisor.engine.run import Change, Observer, Phases, Run
from supervisor.lines import COLOURS, DIM, RESET
from supervisor.listen import Listeners
from supervisor.logs import Log
from supervisor.settings.command import served_name
from supervisor.settings.settings import Settings
from supervisor.terminal import REDRAW_INTERVAL, Terminal

BAR, SPINNER, CHECK_MARK = "━", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "✓"
NAME_WIDTH, BAR_WIDTH, OTHER_WIDTH = 29, 32, 42  # the bar has less where a terminal has no room for it beside the rest


class StartDisplay(Observer):
    """`foot` is the terminal, where there is one; `invitation` is called once the engine serves."""

    def __init__(self, lines: Log, foot: Terminal | None, *, colour: bool, invitation: Callable[[], str]) -> None:
        self.log = logging.getLogger("supervisor")
        self.lines = lines
        self.foot = foot
        self.colour = colour
        self.invitation = invitation
        self.has_invited = False
        self.phases: Phases | None = None

    def run_began(self, run: Run) -> None:
        self.phases = run.phases
        if self.foot is not None:
            self.foot.show(self._draw)

    def state_changed(self, change: Change) -> None:
        state = change.state
        if self.foot is not None and (state is State.READY or state in CLOSED_STATES):
            self.foot.hide()
        if state is State.RESTARTING:
            self.phases = None
        if state is not State.READY:
            return
        rows = self.phases.as_rows() if self.phases is not None else []
        if self.foot is not None:
            self.lines.put(draw_waterfall(rows, running=False, colour=self.colour))
        else:
            summary = ", ".join(f"{row['name']} {row['seconds']:.1f} s" for row in rows)
            self.log.info("vLLM's start: %s", summary, extra={"fields": {"phases": rows}})
        if not self.has_invited:
            self.has_invited = True
            self.log.info("%s", self.invitation())

    def _draw(self) -> Sequence[str]:
        phases = self.phases  # this is the terminal's thread: they may change meanwhile
        if phases is None:
            return ()
        return draw_waterfall(phases.as_rows(), phases.progress, running=True, colour=self.colour)


def invitation(settings: Settings, listeners: Listeners, simulator: str) -> str:
    """Returns what to do now that it serves: the URL, and a line to paste."""
    chat = {"messages": [{"role": "user", "content": "What are you?"}]}
    key_option = ' -H "Authorization: Bearer $KEY"' if any(keys.values for keys in settings.keys) else ""
    if simulator:
        job = shlex.quote(json.dumps({"input": chat}))
        request = f"{simulator}/runsync{key_option} -H 'Content-Type: application/json' -d {job}"
        return f"ready: a simulated RunPod endpoint, {simulator}\n  curl {request}"
    if settings.cluster is not None and settings.cluster.is_headless:
        return f"ready: {settings.cluster.name}; rank 0, at {settings.cluster.leader}, serves"
    if not listeners.gateway:
        return f"ready: up to {settings.knobs.max_concurrency} of RunPod's jobs at once"
    url = listen.url(listeners.gateway[0], "https" if settings.knobs.tls_cert else "http")
    body = shlex.quote(json.dumps({"model": served_name(settings), **chat}))
    return f"ready: {url}\n  curl {url}/v1/chat/completions{key_option} -H 'Content-Type: application/json' -d {body}"


def draw_waterfall(phases: Sequence[Mapping[str, object]], note: str = "", *, running: bool, colour: bool) -> list[str]:
    """Draws a line for each phase (`name`, `seconds`), its bar where its time was. `note` is how far the last is."""
    dim, highlight, plain = (DIM, COLOURS["INFO"], RESET) if colour else ("", "", "")
    durations = [float(str(row["seconds"])) for row in phases]
    total = max(sum(durations), 0.001)
    width = max(0, min(BAR_WIDTH, shutil.get_terminal_size().columns - OTHER_WIDTH))
    lines, elapsed = [], 0.0
    for index, (row, seconds) in enumerate(zip(phases, durations, strict=True)):
        is_last = index == len(durations) - 1
        sign = SPINNER[int(time.monotonic() / REDRAW_INTERVAL) % len(SPINNER)] if is_last and running else CHECK_MARK
        start, end = round(width * elapsed / total), round(width * (elapsed + seconds) / total)
        bar = " " * start + BAR * max(min(1, width), end - start)
        suffix = f"  {note}" if is_last and note else ""
        name = f"{row['name']!s:<{NAME_WIDTH}}"
        lines.append(f"{highlight}{sign}{plain} {name}{dim}{seconds:6.1f} s{plain}  {bar}{suffix}".rstrip())
        elapsed += seconds
    return lines
