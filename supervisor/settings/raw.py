"""Reads vLLM's own arguments as the user gave them: SUPERVISOR_EXTRA_ARGS, and what follows `--` on the command line.

They go to vLLM as they are, after everything else. They are read here all the same, so that what is wrong with them is
told now instead of ten seconds into vLLM's start, and what they override is not passed twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from supervisor.settings.names import OPTION_ADVICE, OWNED, REMOVED, advice
from supervisor.settings.options import respell
from supervisor.settings.sources import Report, Setting
from supervisor.settings.typos import missing_hint
from supervisor.vllm.catalogue import Catalogue, Option, key_of
from supervisor.vllm.values import BadValue

NEGATIVE_NUMBER = re.compile(r"-\d+(\.\d+)?")


def read(tokens: Sequence[str], source: str, catalogue: Catalogue, report: Report) -> dict[str, tuple[Option, Setting]]:
    """Returns the options among `tokens`, by the variable that each stands for, or by what was written (`--x.y`)."""
    options = {}
    (_, loose_tokens), *groups = _group_tokens(tokens)
    for token, next_tokens in groups:
        name, equals_sign, text = token.partition("=")
        base, dot, _ = name.partition(".")
        option, is_off = catalogue.match(base)
        if option is None:
            _report_unknown(base, next_tokens, source, catalogue, report)
            continue
        if option.key in OWNED or option.key == "model":
            reason = OWNED.get(option.key, "set MODEL, or name the model after `supervisor up`")
            report.problems.append(f"{base} ({source}): can't be passed to vLLM: {reason}")
            continue
        is_list = option.kind == "list" and not dot
        max_values = 0 if equals_sign or option.is_switch else len(next_tokens) if is_list else 1
        values = [text] if equals_sign else next_tokens[:max_values]
        loose_tokens += next_tokens[max_values:]
        if fault := _find_fault(option, values, dot):
            report.problems.append(f"{' '.join((token, *next_tokens[:max_values]))} ({source}): {fault}")
            continue
        is_append = option.kind == "append" and not dot
        value: object = not is_off if option.is_switch else tuple(values) if is_list or is_append else "".join(values)
        variable = name if is_append or (dot and not option.is_switch) else option.variable
        options[variable] = option, Setting(variable, value, source)
    report.problems += [f"{token} ({source}): there is no option before it that takes it" for token in loose_tokens]
    return options


def _group_tokens(tokens: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns each option with the tokens up to the next one. What stands before the first one is with an empty one."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for token in tokens:
        if token.startswith("-") and token != "-" and not NEGATIVE_NUMBER.fullmatch(token):  # noqa: S105  # no password
            groups.append((token, []))
        else:
            groups[-1][1].append(token)
    return groups


def _find_fault(option: Option, values: list[str], dot: str) -> str | None:
    if option.is_switch:
        return f"{option.name} takes no value" if values else None
    if not values and (dot or option.kind != "optional"):
        return "a value is missing"
    if dot:
        return None
    if len(values) == 1 and (respelling := respell(option, values[0])) != values[0]:
        return f"write {respelling!r}"
    try:
        for value in values:
            option.check(value)
    except BadValue as error:
        return f"expected {error}"
    return None


def _report_unknown(base: str, next_tokens: list[str], source: str, catalogue: Catalogue, report: Report) -> None:
    """Reports a misspelt option as a problem. One that is like no other may belong to a vLLM of the user's own."""
    message, key = f"{base} ({source}): vLLM {catalogue.version} has no such option", key_of(base)
    # vLLM's parser knows `-O3` and the like, whose value is glued on, beside its options. A catalogue may have none.
    short_names = [name for option in catalogue.by_key.values() for name in option.short]
    is_short = not short_names or (not next_tokens and base.startswith(("-O", *short_names)))
    if reason := advice(OPTION_ADVICE, base):
        report.problems.append(f"{base} ({source}): {reason}")
    elif base.startswith("--") or not is_short:
        if reason := missing_hint(key, catalogue):
            report.problems.append(message + (reason if key in REMOVED else reason.replace("_", "-")))
        else:
            report.warnings.append(f"{message}; it is passed as it is")
