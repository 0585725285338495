"""How far a start is, as a terminal shows it below the log (output.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from supervisor.lines import COLOURS, DIM, PLAIN
from supervisor.output import INTERVAL

BAR, SPINNER, DONE = "━", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "✓"
NAME_WIDTH, BAR_WIDTH = 29, 32


def waterfall(phases: Sequence[Mapping[str, object]], note: str = "", *, running: bool, colour: bool) -> list[str]:
    """A line for each phase (`name`, `seconds`), its bar where its time was. `note` is how far the last one is."""
    dim, mark, plain = (DIM, COLOURS["INFO"], PLAIN) if colour else ("", "", "")
    times = [float(str(row["seconds"])) for row in phases]
    total = max(sum(times), 0.001)
    lines, before = [], 0.0
    for number, (row, seconds) in enumerate(zip(phases, times, strict=True)):
        last = number == len(times) - 1
        sign = SPINNER[int(time.monotonic() / INTERVAL) % len(SPINNER)] if last and running else DONE
        start, end = round(BAR_WIDTH * before / total), round(BAR_WIDTH * (before + seconds) / total)
        bar = " " * start + BAR * max(1, end - start)
        about = f"  {note}" if last and note else ""
        name = f"{row['name']!s:<{NAME_WIDTH}}"
        lines.append(f"{mark}{sign}{plain} {name}{dim}{seconds:6.1f} s{plain}  {bar}{about}")
        before += seconds
    return lines
