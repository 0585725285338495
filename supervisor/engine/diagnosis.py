"""Why the engine ended: exit code and log tail -> one sentence. The table of causes and remedies has its place here."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable

ERROR_LINE = re.compile(r"\b\w*(Error|Exception)\b: |\berror: ")
# What vLLM puts before each of its lines: "(APIServer pid=12) ERROR 11-21 19:00:00 [core.py:1] ".
# Levels below ERROR: such a line may name an exception that was dealt with.
HARMLESS = re.compile(r"^(\([^)]*pid=\d+\) )*(DEBUG|INFO|WARNING)\b")
LINE_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )*([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (\[[^\]]*\] )?)?")


def how_it_ended(exit_code: int) -> str:
    """`exit code 1`, or `killed by SIGKILL`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def last_error(lines: Iterable[str]) -> str | None:
    """The last line of a log that names an error, without vLLM's prefix."""
    found = None
    for line in lines:
        if HARMLESS.search(line):
            continue
        text = LINE_PREFIX.sub("", line).strip()
        if ERROR_LINE.search(text):
            found = text
    return found
