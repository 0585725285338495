"""Where a log says that something failed: the last traceback of each process, and what stands after it.

vLLM is several processes that write into one log, each under a prefix of its own, and most failures are told by more
than one of them. Pure: lines in, lines out; what they mean is diagnosis.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

COLOUR = re.compile(r"\x1b\[[0-9;]*m|\[0(?:;\d+)?m")  # of a copy without what begins it, too
# What docker, its compose and desktop, Kubernetes and journald put before each line; a name in brackets.
STAMP = re.compile(
    r"^(?:[a-z][\w.-]{1,60} +\| |\[[\w./ -]{2,120}\] (?= ?(?:\([A-Z]\w+ pid=|(?:DEBUG|INFO|WARNING|ERROR)\b)))?"
    r"(?:\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:?\d\d) |\d{4}-\d\d-\d\d [\d:.]+ \| |"
    r"[A-Z][a-z]{2} +\d+ \d\d:\d\d:\d\d \S{1,64} [\w./@-]{1,64}\[\d+\]: )?(?: INFO dynamo_engine_vllm::worker: VLLM: )?"
)
# Who writes, before each line: "(EngineCore pid=12) ", "(Worker pid=9) (Worker_TP0 pid=9) ", "[rank0]: ", and Ray's
# "(RayWorkerWrapper pid=9, ip=10.0.0.2) ".
WHO = r"(?:\([^()\n]{0,80}pid=\d+[^()\n]{0,80}\) ?|\[rank\d+\]: ?)*"
# After it vLLM's own stamp: "ERROR 11-21 19:00:00 [core.py:1] "; without the first bracket up to 0.8, and without the
# date where VLLM_LOGGING_CONFIG_PATH says so.
WHEN = r"(?:\d{4}-)?\d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)?"
LINE_PREFIX = re.compile(rf"^({WHO})(?:[A-Z]+ {WHEN} (?:\[[^\]]*\] ?|[\w/]+\.py:\d+\] ?)?|ERROR \[[\w/]+\.py:\d+\] ?)?")
# Levels below ERROR, of vLLM, torch and others: such a line may name an exception that was dealt with. One is bad news.
HARMLESS = re.compile(
    rf"^(?!.*Available KV cache memory: -) ?{WHO}(?:(?:DEBUG|INFO|WARNING)\b|\[?[IW]\d{{4}} |"
    r"\[?\d{4}-\d\d-\d\d[ T][\d:.,]+Z?\]?[\s\-|]{1,3}\[?(?:DEBUG|INFO|WARN))"
)
# The API server is at work: what failed before this did not end it, and may be a client's.
SERVES = re.compile(r'HTTP/\d(?:\.\d)?" \d{3}\b|\bAvg prompt throughput|Application startup complete')
# It is not any more, whatever it still answers.
ENGINE_DIED = re.compile(r"(?:\w{1,30}\.){0,6}EngineDeadError: |EngineCore encountered a fatal error")
# The exception's own line: its class, whatever that is called (`Unsupported`, `NoSuchBucket`), and mostly a text.
RAISED = re.compile(r"(?!(?:try|else|finally|pass|return|raise|break|continue)(?::|$))[A-Za-z_]\w*(?:\.\w+)*(?::|$)")
# The source of an assertion, where it tells more than a name.
ASSERTED = re.compile(r" {4,}(assert [^\n]{12,200}[^(,\n])$")
CHAINED = re.compile(r"The above exception was the direct cause|During handling of the above exception")
# A worker's error that Ray only hands on, without its traceback.
HANDED_ON = re.compile(r"^ray\.exceptions\.RayTaskError\((?!Ray)(\w+)\): (?!ray::)")
# A destructor's: nobody gets it, and it comes when all is being torn down. And a plugin's, without which vLLM goes on.
IGNORED = re.compile(r"Exception ignored |Failed to load plugin ")
FRAME = re.compile(r' *File "(?:[^"\n]*(?:site|dist)-packages/)?([^"\n]+)"(?:, line (\d+)(?! in)|, in )')
# What vLLM shows of its settings: at the start, and of the engine when it is made or dies.
SETTINGS = re.compile(r"(?:non-default args: |with config: |args: Namespace\()[^\n]+")
# pydantic's: what it refuses stands in the second line, without the values after it.
REFUSED = re.compile(r"validation errors? for \w+\n  (?:Value error|Assertion failed), (.+?)(?: \[type=|$)")
# What the engine says of a worker's error: of use where the worker's own words are not in the log any more.
RELAYED = re.compile(
    r"Worker failed with error ['\"](.{3,1000}?)(?:['\"], please check the stack trace|$)"
    r"|^(?!.{0,300}Worker failed)(.{3,1000})['\"], please check the stack trace"  # the last of its lines
)
# A line that names an error, in a log without a traceback.
NAMES_ERROR = re.compile(r"(?:Error|Exception)(?:_\w{1,40}|\(\w{1,20}\))?(?:: |\(['\"])|\berror: ")
# One as vLLM's V0 wrote it before its traceback: `ValueError('text')`.
SHOWN = re.compile(r"^(\w{1,80}(?:Error|Exception))\((['\"])(.*)\2\)$")

# What libraries say that raise nothing; and how many lines before the end it is looked for.
STRAY = re.compile(r"RESOURCE_EXHAUSTED|INVALID_ARGUMENT|\b(?:error|fatal) *: |is not valid\b|\w failed with \[")
NEAR = 40
# A line that may tell of a fault, where nothing else does; what only announces one.
FAULT = re.compile(
    r"(?i)\b(?:errors?|errno|failed|failure|fatal|cannot|can't|could not|unable to|unsupported|only supports|invalid"
    r"|denied|refused|abort(?:ed|ing)|panic(?:ked)?|no such|out of"
    r"|not (?:found|supported|available|permitted|allowed|implemented))\b"
)
WARNED = re.compile(r"\bWARNING\b.{0,200}\w(?:Error|Exception)[:(]|\] No platform detected, vLLM|Python stub: \w")
ANNOUNCED = re.compile(
    r"(?i)failed to start(?! [^\n:]{1,40}: (?!NoneType)\w)|handler failed|hit an exception|aborted due to errors"
)


class Failure(NamedTuple):
    """`whole`: the log without prefixes, harmless lines and quoted source. `last`: of that, what failed last; the whole
    of it where there is no traceback. `error`: the last error's own words; `raised`: its traceback. `settings`: what
    the log shows of vLLM's."""

    whole: str
    last: str
    error: str | None
    raised: str
    settings: str = ""


class _Line(NamedTuple):
    who: str
    text: str
    begins: int | None  # of an exception's line: the number of the line where its chain of tracebacks begins
    place: str  # and what was asserted there


class _Process:
    """What one process has written so far."""

    inside = False  # a traceback
    died = False  # its engine
    ignored = False  # the last one is of no account
    begins = serves = 0  # by number of a line; it serves at the latest there
    place = previous = ""


def read(lines: Iterable[str], follows: Callable[[str], bool]) -> Failure:
    """`follows` knows what a process says when it is another one that failed: never the cause."""
    told = _told(lines := list(lines))
    settings = "\n".join(found[0] for line in lines if (found := SETTINGS.search(line)))
    ends: dict[str, int] = {}  # who -> where its last failure begins
    error = None
    for number, line in enumerate(told):
        if line.begins is not None and not follows(_message(told, number)):
            ends[line.who], error = line.begins, number
    whole = "\n".join(line.text for line in told)
    last = "\n".join(line.text for number, line in enumerate(told) if number >= ends.get(line.who, len(told)))
    relayed = next((found[1] or found[2] for line in reversed(told) if (found := RELAYED.search(line.text))), None)
    if error is None and relayed is not None and not follows(relayed):
        return Failure(whole, last or whole, f"RuntimeError: {relayed}", "", settings)
    if error is None:
        named = (number for number, line in enumerate(told) if NAMES_ERROR.search(line.text) and not follows(line.text))
        error = max(named, default=None)
    if error is None:
        return Failure(whole, last or whole, None, "", settings)
    who, begins = told[error].who, told[error].begins
    frames = (line.text for line in told[begins : error + 1] if line.who == who) if begins is not None else ()
    return Failure(whole, last or whole, _words(told, error), "\n".join(frames), settings)


def _words(told: list[_Line], number: int) -> str:
    """What an exception says; its place where that is nothing, and the next line where it only announces one."""
    text, place = SHOWN.sub(r"\1: \3", told[number].text.strip()), told[number].place
    if found := REFUSED.search(_message(told, number)):
        return f"ValueError: {found[1]}"
    if re.fullmatch(r"[\w.]+:?", text):
        where = f" in {place}" if place and not place.startswith("assert ") else place and f": {place}"
        return f"vLLM failed an internal check ({text.rstrip(':')}){where}."
    return f"{text} {_next(told, number).strip()}" if text.endswith(":") else text


def _message(told: list[_Line], number: int) -> str:
    """An exception's line and the next one where that goes on: pydantic says only there what it is."""
    more = _next(told, number)
    return f"{told[number].text}\n{more}" if more.startswith(" ") else told[number].text


def _next(told: list[_Line], number: int) -> str:
    """Of the same process."""
    rest = (line.text for line in told[number + 1 : number + 40] if line.who == told[number].who)
    return next((text for text in rest if text.strip()), "")


def _told(lines: Iterable[str]) -> list[_Line]:
    told: list[_Line] = []
    processes: dict[str, _Process] = {}
    for raw in lines:
        line = STAMP.sub("", COLOUR.sub("", raw)).rstrip()
        prefix = LINE_PREFIX.match(line)
        assert prefix is not None  # all of it may be missing
        who, text = prefix[1].strip(), HANDED_ON.sub(r"\1: ", line[prefix.end() :])
        process = processes.setdefault(who, _Process())
        if HARMLESS.match(line):
            if SERVES.search(text) and not process.died:
                process.serves = len(told)
            continue
        process.died = process.died or ENGINE_DIED.match(text) is not None
        begins, place = None, ""
        if "Traceback (most recent call last)" in text:
            if not CHAINED.match(process.previous):
                process.begins, process.ignored = len(told), bool(IGNORED.match(process.previous))
            process.inside = not process.ignored
        elif CHAINED.match(text):
            process.inside = not process.ignored
        elif frame := FRAME.match(text):
            if not (process.inside or process.ignored):  # its head has left the lines that are kept
                process.inside, process.begins = True, len(told)
            process.place = f"{frame[1]}:{frame[2]}" if frame[2] else frame[1]
        elif asserted := ASSERTED.match(text):
            if not process.inside:  # as above
                process.inside, process.begins, process.place = True, len(told), ""
            process.place = f"{process.place}: {asserted[1]}".removeprefix(": ")
        elif process.inside and RAISED.match(text):
            begins, place, process.inside = process.begins, process.place, False
        if text.strip():
            process.previous = text
        if not text.startswith("    ") or text.startswith(("    TypeError: ", "    ValueError: ")):  # what is within
            told.append(_Line(who, text, begins, place))
    blank = _Line("", "", None, "")
    return [line if number >= processes[line.who].serves else blank for number, line in enumerate(told)]


def stray(failure: Failure) -> Failure | None:
    """Where all tracebacks only follow: the last line before them that says what failed."""
    return _last(failure, STRAY.search)


def nearest(failure: Failure, lines: Iterable[str]) -> Failure | None:
    """Where nothing says so: the last line that may; of warnings, one that names an error. No other line: every key may
    see a cause, and a log has what clients sent."""
    found = _last(failure, lambda line: FAULT.search(line) and not ANNOUNCED.search(line))
    return found or _last(failure._replace(whole="\n".join(lines)), WARNED.search)


def _last(failure: Failure, tells: Callable[[str], object]) -> Failure | None:
    found = [line for line in failure.whole.splitlines()[-NEAR:] if tells(line)]
    return failure._replace(last="\n".join(found), error=found[-1], raised="") if found else None
