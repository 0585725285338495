"""Finds where a log says that something failed: the last traceback of each process, and what stands after it.

vLLM is several processes that write into one log, each under a prefix of its own, and most failures are told by more
than one of them. It is pure: lines in, lines out; diagnosis.py knows what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

COLOUR = re.compile(r"\x1b\[[0-9;]*m|\[0(?:;\d+)?m")  # a copy may have lost what begins it
# docker, its compose and desktop, Kubernetes and journald put this before each line; it may have a name in brackets.
STAMP = re.compile(
    r"^(?:[a-z][\w.-]{1,60} +\| |\[[\w./ -]{2,120}\] (?= ?(?:\([A-Z]\w+ pid=|(?:DEBUG|INFO|WARNING|ERROR)\b)))?"
    r"(?:\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:?\d\d) |\d{4}-\d\d-\d\d [\d:.]+ \| |"
    r"[A-Z][a-z]{2} +\d+ \d\d:\d\d:\d\d \S{1,64} [\w./@-]{1,64}\[\d+\]: )?(?: INFO dynamo_engine_vllm::worker: VLLM: )?"
)
# Each line begins with who writes it: "(EngineCore pid=12) ", "(Worker pid=9) (Worker_TP0 pid=9) ", "[rank0]: ", and
# Ray's "(RayWorkerWrapper pid=9, ip=10.0.0.2) ".
TAG = r"(?:\([^()\n]{0,80}pid=\d+[^()\n]{0,80}\) ?|\[rank\d+\]: ?)*"
# After it comes vLLM's own stamp: "ERROR 11-21 19:00:00 [core.py:1] "; without the first bracket up to 0.8, and
# without the date where VLLM_LOGGING_CONFIG_PATH says so.
TIME = r"(?:\d{4}-)?\d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)?"
LINE_PREFIX = re.compile(rf"^({TAG})(?:[A-Z]+ {TIME} (?:\[[^\]]*\] ?|[\w/]+\.py:\d+\] ?)?|ERROR \[[\w/]+\.py:\d+\] ?)?")
# A line of a level below ERROR may name an exception that was dealt with: vLLM's, torch's, others'. One is bad news.
HARMLESS_LINE = re.compile(
    rf"^(?!.*Available KV cache memory: -) ?{TAG}(?:(?:DEBUG|INFO|WARNING)\b|\[?[IW]\d{{4}} |"
    r"\[?\d{4}-\d\d-\d\d[ T][\d:.,]+Z?\]?[\s\-|]{1,3}\[?(?:DEBUG|INFO|WARN))"
)
# Such a line shows the API server at work: what failed before it did not end it, and may be a client's.
SERVING_LINE = re.compile(r'HTTP/\d(?:\.\d)?" \d{3}\b|\bAvg prompt throughput|Application startup complete')
# After such a line it is not at work any more, whatever it still answers.
ENGINE_DIED = re.compile(r"(?:\w{1,30}\.){0,6}EngineDeadError: |EngineCore encountered a fatal error")
# The exception's own line has its class, whatever that is called (`Unsupported`, `NoSuchBucket`), and mostly a text.
EXCEPTION = re.compile(r"(?!(?:try|else|finally|pass|return|raise|break|continue)(?::|$))[A-Za-z_]\w*(?:\.\w+)*(?::|$)")
# This is the source of an assertion, where it tells more than a name.
ASSERTION = re.compile(r" {4,}(assert [^\n]{12,200}[^(,\n])$")
CHAIN_LINE = re.compile(r"The above exception was the direct cause|During handling of the above exception")
# Ray hands a worker's error on like this, without its traceback.
RAY_TASK_ERROR = re.compile(r"^ray\.exceptions\.RayTaskError\((?!Ray)(\w+)\): (?!ray::)")
# Nobody gets a destructor's error, which comes when all is torn down. And vLLM goes on without a plugin that fails.
IGNORED_ERROR = re.compile(r"Exception ignored |Failed to load plugin ")
FRAME = re.compile(r' *File "(?:[^"\n]*(?:site|dist)-packages/)?([^"\n]+)"(?:, line (\d+)(?! in)|, in )')
# vLLM shows its settings so at the start, and the engine's when that is made or dies.
SETTINGS_LINE = re.compile(r"(?:non-default args: |with config: |args: Namespace\()[^\n]+")
# What pydantic refuses stands in the second line; the values after it are left out.
VALIDATION_ERROR = re.compile(r"validation errors? for \w+\n  (?:Value error|Assertion failed), (.+?)(?: \[type=|$)")
# The engine says this of a worker's error. It is of use where the worker's own words are not in the log any more.
RELAY = re.compile(
    r"Worker failed with error ['\"](.{3,1000}?)(?:['\"], please check the stack trace|$)"
    r"|^(?!.{0,300}Worker failed)(.{3,1000})['\"], please check the stack trace"  # the last of its lines
)
# Such a line names an error, in a log without a traceback.
ERROR_NAME = re.compile(r"(?:Error|Exception)(?:_\w{1,40}|\(\w{1,20}\))?(?:: |\(['\"])|\berror: ")
# vLLM's V0 wrote an error like this before its traceback: `ValueError('text')`.
ERROR_REPR = re.compile(r"^(\w{1,80}(?:Error|Exception))\((['\"])(.*)\2\)$")

# Libraries that raise nothing say this; it is looked for in this many lines before the end.
LIBRARY_WORD = re.compile(r"RESOURCE_EXHAUSTED|INVALID_ARGUMENT|\b(?:error|fatal) *: |is not valid\b|\w failed with \[")
MAX_LINES = 40
# Such a line may tell of a fault, where nothing else does; an announcement only says that there is one.
FAULT_WORD = re.compile(
    r"(?i)\b(?:errors?|errno|failed|failure|fatal|cannot|can't|could not|unable to|unsupported|only supports|invalid"
    r"|denied|refused|abort(?:ed|ing)|panic(?:ked)?|no such|out of"
    r"|not (?:found|supported|available|permitted|allowed|implemented))\b"
)
WARNING_LINE = re.compile(r"\bWARNING\b.{0,200}\w(?:Error|Exception)[:(]|\] No platform detected, vLLM|Python stub: \w")
ANNOUNCEMENT = re.compile(
    r"(?i)failed to start(?! [^\n:]{1,40}: (?!NoneType)\w)|handler failed|hit an exception|aborted due to errors"
)


class Failure(NamedTuple):
    """`whole`: the log without prefixes, harmless lines and quoted source. `last`: of that, what failed last; the whole
    of it where there is no traceback. `error`: the last error's own words; `raised`: its traceback. `settings`: what
    the log shows of vLLM's settings."""

    whole: str
    last: str
    error: str | None
    raised: str
    settings: str = ""


class _Line(NamedTuple):
    writer: str
    text: str
    chain_start: int | None  # for an exception's line: the number of the line where its chain of tracebacks begins
    place: str  # where it was raised, and what was asserted there


class _Process:
    """Tells what one process has written so far."""

    in_traceback = False
    engine_died = False
    is_ignored = False  # its last traceback is of no account
    chain_start = serving_from = 0  # numbers of lines; from the second on, at the latest, it serves
    place = previous_line = ""


def read(lines: Iterable[str], is_effect: Callable[[str], bool]) -> Failure:
    """Returns what failed last. `is_effect` knows what a process says when another one failed: never the cause."""
    log = _parse(lines := list(lines))
    settings = "\n".join(found[0] for line in lines if (found := SETTINGS_LINE.search(line)))
    ends: dict[str, int] = {}  # writer -> where its last failure begins
    error = None
    for number, line in enumerate(log):
        if line.chain_start is not None and not is_effect(_message(log, number)):
            ends[line.writer], error = line.chain_start, number
    whole = "\n".join(line.text for line in log)
    last = "\n".join(line.text for number, line in enumerate(log) if number >= ends.get(line.writer, len(log)))
    relay = next((found[1] or found[2] for line in reversed(log) if (found := RELAY.search(line.text))), None)
    if error is None and relay is not None and not is_effect(relay):
        return Failure(whole, last or whole, f"RuntimeError: {relay}", "", settings)
    if error is None:
        hits = (number for number, line in enumerate(log) if ERROR_NAME.search(line.text) and not is_effect(line.text))
        error = max(hits, default=None)
    if error is None:
        return Failure(whole, last or whole, None, "", settings)
    writer, start = log[error].writer, log[error].chain_start
    frames = (line.text for line in log[start : error + 1] if line.writer == writer) if start is not None else ()
    return Failure(whole, last or whole, _error_text(log, error), "\n".join(frames), settings)


def _error_text(log: list[_Line], number: int) -> str:
    """Returns what an exception says; its place where that is nothing, the next line too where it announces one."""
    text, place = ERROR_REPR.sub(r"\1: \3", log[number].text.strip()), log[number].place
    if found := VALIDATION_ERROR.search(_message(log, number)):
        return f"ValueError: {found[1]}"
    if re.fullmatch(r"[\w.]+:?", text):
        where = f" in {place}" if place and not place.startswith("assert ") else place and f": {place}"
        return f"vLLM failed an internal check ({text.rstrip(':')}){where}."
    return f"{text} {_next_text(log, number).strip()}" if text.endswith(":") else text


def _message(log: list[_Line], number: int) -> str:
    """Returns an exception's line, and the next one where that goes on: pydantic says only there what it is."""
    continuation = _next_text(log, number)
    return f"{log[number].text}\n{continuation}" if continuation.startswith(" ") else log[number].text


def _next_text(log: list[_Line], number: int) -> str:
    """Returns the next text of the same process; nothing where there is none."""
    rest = (line.text for line in log[number + 1 : number + 40] if line.writer == log[number].writer)
    return next((text for text in rest if text.strip()), "")


def _parse(lines: Iterable[str]) -> list[_Line]:
    log: list[_Line] = []
    processes: dict[str, _Process] = {}
    for raw_line in lines:
        line = STAMP.sub("", COLOUR.sub("", raw_line)).rstrip()
        prefix = LINE_PREFIX.match(line)
        assert prefix is not None  # all of it may be missing
        writer, text = prefix[1].strip(), RAY_TASK_ERROR.sub(r"\1: ", line[prefix.end() :])
        process = processes.setdefault(writer, _Process())
        if HARMLESS_LINE.match(line):
            if SERVING_LINE.search(text) and not process.engine_died:
                process.serving_from = len(log)
            continue
        process.engine_died = process.engine_died or ENGINE_DIED.match(text) is not None
        start, place = None, ""
        if "Traceback (most recent call last)" in text:
            if not CHAIN_LINE.match(process.previous_line):
                process.chain_start, process.is_ignored = len(log), bool(IGNORED_ERROR.match(process.previous_line))
            process.in_traceback = not process.is_ignored
        elif CHAIN_LINE.match(text):
            process.in_traceback = not process.is_ignored
        elif frame := FRAME.match(text):
            if not (process.in_traceback or process.is_ignored):  # its first line is not kept any more
                process.in_traceback, process.chain_start = True, len(log)
            process.place = f"{frame[1]}:{frame[2]}" if frame[2] else frame[1]
        elif assertion := ASSERTION.match(text):
            if not process.in_traceback:  # as above
                process.in_traceback, process.chain_start, process.place = True, len(log), ""
            process.place = f"{process.place}: {assertion[1]}".removeprefix(": ")
        elif process.in_traceback and EXCEPTION.match(text):
            start, place, process.in_traceback = process.chain_start, process.place, False
        if text.strip():
            process.previous_line = text
        if not text.startswith("    ") or text.startswith(("    TypeError: ", "    ValueError: ")):  # a nested error
            log.append(_Line(writer, text, start, place))
    blank = _Line("", "", None, "")
    return [line if number >= processes[line.writer].serving_from else blank for number, line in enumerate(log)]


def find_library_error(failure: Failure) -> Failure | None:
    """Returns the last line that says what failed, before tracebacks that are all only effects."""
    return _find_last(failure, LIBRARY_WORD.search)


def find_hint(failure: Failure, lines: Iterable[str]) -> Failure | None:
    """Returns the last line that may say what failed, where nothing does; of warnings, one that names an error. No
    other line will do: every key may see a cause, and a log has what clients sent."""
    found = _find_last(failure, lambda line: FAULT_WORD.search(line) and not ANNOUNCEMENT.search(line))
    return found or _find_last(failure._replace(whole="\n".join(lines)), WARNING_LINE.search)


def _find_last(failure: Failure, matches: Callable[[str], object]) -> Failure | None:
    found = [line for line in failure.whole.splitlines()[-MAX_LINES:] if matches(line)]
    return failure._replace(last="\n".join(found), error=found[-1], raised="") if found else None
