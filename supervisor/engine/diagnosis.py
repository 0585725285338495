"""Why the engine ended: exit code and log tail -> cause and remedy, by the ordered table in `causes.toml`.

Each rule's pattern is looked for in the last lines of vLLM's log; the first rule that matches speaks. A cause that is
permanent makes a start that never succeeded not worth repeating.
"""

from __future__ import annotations

import re
import signal
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ERROR_LINE = re.compile(r"(?:Error|Exception)(?:_\w{1,40})?: |\berror: ")
# What vLLM puts before each of its lines: "(APIServer pid=12) ERROR 11-21 19:00:00 [core.py:1] ".
LINE_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )*([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (\[[^\]]*\] ?)?)?")
# Levels below ERROR, vLLM's and torch's: such a line may name an exception that was dealt with.
HARMLESS = re.compile(r"^(\([^)]*pid=\d+\) )*(DEBUG|INFO|WARNING)\b|^\[?[IW]\d{4} ")
# What is searched, in characters: clients help to write a log, and 80 searches of 500 long lines took 45 s.
LONGEST_TEXT = 250_000
# What a part of vLLM says when another one has ended: never the root.
FOLLOW_UP = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|EngineCore encountered an issue|"
    r"EngineDeadError|Engine core proc \S+ died|cancelled$|RuntimeError: Executor failed"
)
# What the API server says on SIGTERM; the errors after it are those of things being taken away.
TOLD_TO_STOP = re.compile(r"\[shutdown\] API server: shutdown triggered")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What happened, and what to change. `permanent`: the same settings will end the same way."""

    cause: str
    remedy: str
    permanent: bool

    @property
    def text(self) -> str:
        return f"{self.cause} {self.remedy}".strip()


TABLE = tomllib.loads(Path(__file__).with_name("causes.toml").read_text(encoding="utf-8"))


def _rule(
    *, pattern: str, cause: str, remedy: str | None = None, shared_remedy: str = "", permanent: bool = True
) -> tuple[re.Pattern[str], Diagnosis]:
    """A row of the table; a misspelt key is an error, and so is a shared remedy that is not there."""
    remedy = TABLE["remedies"][shared_remedy] if remedy is None else remedy
    return re.compile(pattern, re.I | re.S), Diagnosis(cause, remedy, permanent)


RULES = tuple(_rule(**row) for row in TABLE["cause"])
# By the signal's number.
SIGNALS: dict[int, Diagnosis] = {
    signal.Signals[name]: Diagnosis(**end, permanent=False) for name, end in TABLE["signals"].items()
}
ENGINE_GONE = Diagnosis(**TABLE["gone"], permanent=False)


def diagnose(exit_code: int, lines: Iterable[str], ended_by_us: str | None = None) -> Diagnosis:
    """`exit_code` is -N for signal N; `lines` the last ones of the log, oldest first; `ended_by_us` says why, where it
    was us who killed it, and then the exit code means nothing."""
    lines = list(lines)
    told = (LINE_PREFIX.sub("", line) for line in lines if not HARMLESS.match(line))
    text = "\n".join(line for line in told if not line.startswith("    "))  # a traceback's quoted source tells nothing
    text = text[-LONGEST_TEXT:]
    for pattern, rule in RULES:
        if found := pattern.search(text):
            groups = {name: (value or "").strip().rstrip(".") for name, value in found.groupdict().items()}
            groups |= {name.upper(): value.upper().replace("-", "_") for name, value in groups.items()}
            return Diagnosis(rule.cause.format_map(groups), rule.remedy.format_map(groups), rule.permanent)
    if ended_by_us is not None:
        if "waiting for the other" in ended_by_us:
            return Diagnosis(f"{ended_by_us}.", TABLE["remedies"]["other_ranks"], permanent=False)
        return Diagnosis(f"{ended_by_us}.", "", permanent="SUPERVISOR_STARTUP_TIMEOUT" in ended_by_us)
    return by_the_end(exit_code, lines)


def by_the_end(exit_code: int, lines: list[str]) -> Diagnosis:
    """Of a log that no rule knows: by who stopped it, by the signal, by its last error."""
    if any(TOLD_TO_STOP.search(line) for line in lines):
        return Diagnosis("It was told to stop (SIGTERM), and not by us.", "", permanent=False)
    if -exit_code in SIGNALS:
        return SIGNALS[-exit_code]
    if (error := last_error(lines)) is not None:
        return Diagnosis(error, "", permanent=exit_code > 0)
    if any(FOLLOW_UP.search(line) for line in lines if not HARMLESS.match(line)):
        return ENGINE_GONE
    return Diagnosis("Its log does not say why.", "", permanent=False)


def last_error(lines: Iterable[str]) -> str | None:
    """The last line of a log that names an error, without vLLM's prefix; what only follows from one is no error."""
    own = (line for line in lines if not HARMLESS.search(line) and not FOLLOW_UP.search(line))
    texts = (LINE_PREFIX.sub("", line).strip() for line in own)
    return next((text for text in reversed(list(texts)) if ERROR_LINE.search(text)), None)
