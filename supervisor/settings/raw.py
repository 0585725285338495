"""vLLM's own arguments as the user gave them: SUPERVISOR_EXTRA_ARGS, and what follows `--` on the command line.

They go to vLLM as they are, after everything else. They are read here all the same: what is wrong with them is told
now instead of ten seconds into vLLM's start, and what they override is not passed twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from supervisor.settings.names import NO_OPTIONS, OWNED, REMOVED, advice
from supervisor.settings.options import respelled
from supervisor.settings.sources import Report, Setting
from supervisor.settings.typos import missing
from supervisor.vllm.catalogue import Catalogue, Option, key_of
from supervisor.vllm.values import BadValue

NEGATIVE_NUMBER = re.compile(r"-\d+(\.\d+)?")


def read(tokens: Sequence[str], source: str, catalogue: Catalogue, report: Report) -> dict[str, tuple[Option, Setting]]:
    """The options among `tokens`, by the variable that each stands for, or by what was written (`--x.y`)."""
    found = {}
    (_, strays), *groups = _split(tokens)
    for token, following in groups:
        name, glued, value = token.partition("=")
        base, dotted, _ = name.partition(".")
        option, is_off = _find(base, catalogue)
        if option is None:
            _unknown(base, following, source, catalogue, report)
            continue
        if option.key in OWNED or option.key == "model":
            why = OWNED.get(option.key, "set MODEL, or name the model after `supervisor up`")
            report.problems.append(f"{base} ({source}): can't be passed to vLLM: {why}")
            continue
        is_list = option.kind == "list" and not dotted
        most = 0 if glued or option.is_switch else len(following) if is_list else 1
        values = [value] if glued else following[:most]
        strays += following[most:]
        if wrong := _wrong(option, values, dotted):
            report.problems.append(f"{' '.join((token, *following[:most]))} ({source}): {wrong}")
            continue
        adds_up = option.kind == "append" and not dotted
        meant: object = not is_off if option.is_switch else tuple(values) if is_list or adds_up else "".join(values)
        variable = name if adds_up or (dotted and not option.is_switch) else option.variable
        found[variable] = option, Setting(variable, meant, source)
    report.problems += [f"{stray} ({source}): there is no option before it that takes it" for stray in strays]
    return found


def _split(tokens: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with what follows it up to the next; what stands before the first one is with an empty one."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for token in tokens:
        if token.startswith("-") and token != "-" and not NEGATIVE_NUMBER.fullmatch(token):  # noqa: S105  # no password
            groups.append((token, []))
        else:
            groups[-1][1].append(token)
    return groups


def _wrong(option: Option, values: list[str], dotted: str) -> str | None:
    if option.is_switch:
        return f"{option.name} takes no value" if values else None
    if not values and (dotted or option.kind != "optional"):
        return "a value is missing"
    if dotted:
        return None
    if len(values) == 1 and (today := respelled(option, values[0])) != values[0]:
        return f"write {today!r}"
    try:
        for value in values:
            option.check(value)
    except BadValue as error:
        return f"expected {error}"
    return None


def _find(base: str, catalogue: Catalogue) -> tuple[Option | None, bool]:
    """The option, and whether this is its form that switches it off. As argparse does, takes a beginning for the
    whole."""
    options = catalogue.by_key.values()
    if not base.startswith("--"):
        return next((option for option in options if base in option.short), None), False
    key = key_of(base)
    if option := catalogue.find(key):
        return option, False
    name = f"--{key.replace('_', '-')}"
    for option in options:
        if name in option.off or (option.kind == "pair" and key == f"no_{option.key}"):
            return option, True
    beginnings = [option for option in options if option.key.startswith(key)]
    return beginnings[0] if len(beginnings) == 1 else None, False


def _unknown(base: str, following: list[str], source: str, catalogue: Catalogue, report: Report) -> None:
    """A misspelt option is a problem. One that is like no other may be one of a vLLM of the user's own."""
    told, key = f"{base} ({source}): vLLM {catalogue.version} has no such option", key_of(base)
    # `-O3` and the like, whose value is glued on: vLLM's parser knows it beside its options. A catalogue may have none.
    shorts = [name for option in catalogue.by_key.values() for name in option.short]
    is_short = not shorts or (not following and base.startswith(("-O", *shorts)))
    if why := advice(NO_OPTIONS, base):
        report.problems.append(f"{base} ({source}): {why}")
    elif base.startswith("--") or not is_short:
        if why := missing(key, catalogue):
            report.problems.append(told + (why if key in REMOVED else why.replace("_", "-")))
        else:
            report.warnings.append(f"{told}; it is passed as it is")
