"""Finds why the engine ended: exit code and log tail -> cause and remedy, by the ordered table in `causes.toml`.

The end of the last traceback is the cause (tracebacks.py). The table says what it means and what to change, for the
error itself, or for its kind and what it is about (topics.py). A permanent cause is one that another start meets again.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from supervisor.engine import topics, tracebacks
from supervisor.engine.topics import REMEDIES, TABLE

# Characters that are searched at most: clients help to write a log, and 80 searches of 500 long lines took 45 s.
LONGEST_TEXT = 250_000
# The API server writes this on SIGTERM; the errors after it come from things being taken away.
SHUTDOWN_LINE = re.compile(r"\[shutdown\] API server: shutdown triggered")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Says what happened, and what to change. `permanent`: the same settings will end the same way. `known`: the
    table knows the cause, or a signal tells it, or it was us; else it is vLLM's own last words, or nothing. `vague`:
    it is known which part of vLLM failed, and not what it is about that part."""

    cause: str
    remedy: str
    permanent: bool
    known: bool = field(default=True, compare=False)
    vague: bool = field(default=False, compare=False)

    @property
    def text(self) -> str:
        return f"{self.cause} {self.remedy}".strip()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A row of the table; a misspelt key is an error. `where`: which field of `tracebacks.Failure` is searched.
    `example`: lines of vLLM's that the row is for."""

    pattern: str
    cause: str
    remedy: str
    permanent: bool = True
    where: str = "last"
    example: str

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.S)


RULES, EFFECTS, GONE = (tuple(Rule(**row) for row in TABLE[name]) for name in ("cause", "following", "gone"))
SIGNALS = {signal.Signals[name]: Diagnosis(**end, permanent=False) for name, end in TABLE["signals"].items()}
OOM_KILLED = Diagnosis(**TABLE["oom_killed"], permanent=False)
TERMINATED = Diagnosis("It was told to stop (SIGTERM), and not by us.", "", permanent=False)
HINT_PREFIX = "Its log does not say why; what comes closest to it there: "
UNKNOWN = Diagnosis("Its log does not say why.", "", permanent=False, known=False)


def diagnose(code: int, lines: Iterable[str], end_reason: str | None = None, *, oom_killed: bool = False) -> Diagnosis:
    """Returns why it ended. `code`: the exit code, -N for signal N; `lines`: the last of the log; `end_reason`: why, if
    we killed it (the code means nothing then); `oom_killed`: the kernel killed something here for want of memory."""
    failure = tracebacks.read(lines := list(lines), is_effect)
    code = 128 - code if code - 128 in map(int, SIGNALS) else code  # a shell's, for a command that a signal killed
    shutdown = (apply(EFFECTS, failure) or TERMINATED) if any(map(SHUTDOWN_LINE.search, lines)) else None
    ending = shutdown or _diagnose_by_killer(code, end_reason, oom_killed)
    return apply(RULES, failure) or ending or _diagnose_by_words(code, failure, end_reason, lines)


def _diagnose_by_killer(code: int, end_reason: str | None, oom_killed: bool) -> Diagnosis | None:
    if end_reason is None and code < 0 and -code in SIGNALS:
        return SIGNALS[signal.Signals(-code)]
    if oom_killed:
        return OOM_KILLED
    if end_reason is None or " died" in end_reason:
        return None
    others, timed_out = "waiting for the other" in end_reason, "SUPERVISOR_STARTUP_TIMEOUT" in end_reason
    return Diagnosis(f"{end_reason}.", REMEDIES["other_ranks"] if others else "", permanent=timed_out and not others)


def _diagnose_by_words(code: int, failure: tracebacks.Failure, end_reason: str | None, lines: list[str]) -> Diagnosis:
    if failure.error is not None:
        return _quote(failure, permanent=code > 0 or end_reason is not None)
    if (known := apply(EFFECTS, failure)) is not None or end_reason is not None:
        return known or Diagnosis(f"{end_reason}.", "", permanent=False, known=False)
    if (library_error := tracebacks.find_library_error(failure)) is not None:
        return apply(RULES, library_error) or _quote(library_error, permanent=False)
    if (known := apply(GONE, failure)) is None and code and (hint := tracebacks.find_hint(failure, lines)) is not None:
        return _quote(hint, permanent=False, prefix=HINT_PREFIX)
    return known or UNKNOWN


def _quote(failure: tracebacks.Failure, *, permanent: bool, prefix: str = "") -> Diagnosis:
    words = f"{prefix}{failure.error or ''}"[: topics.LONGEST_ERROR]
    if prefix and (row := apply(RULES, failure._replace(whole=words, last=words))) and not row.vague:  # for a guess
        return Diagnosis(words, row.remedy, permanent, known=False)
    return Diagnosis(words, topics.placeholders(failure)["elsewhere"], permanent, known=False)


def apply(rules: Iterable[Rule], failure: tracebacks.Failure) -> Diagnosis | None:
    """Returns what the first rule that matches says; None where none does."""
    for rule in rules:
        if found := rule.regex.search((getattr(failure, rule.where) or "")[-LONGEST_TEXT:]):
            groups = {name: " ".join((value or "").split()).rstrip(".") for name, value in found.groupdict().items()}
            groups |= {name.upper(): topics.variable(value) for name, value in groups.items()}
            groups |= REMEDIES | topics.placeholders(failure)
            cause, remedy = (topics.fill_in(text, groups) for text in (rule.cause, rule.remedy))
            return Diagnosis(cause, remedy, rule.permanent, vague="{governs}" in rule.remedy)
    return None


def is_effect(text: str) -> bool:
    """Tells whether a process says this where another one has failed: it is never the cause."""
    return any(rule.regex.search(text) for rule in (*EFFECTS, *GONE))
