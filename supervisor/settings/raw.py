"""Reads vLLM's own arguments: SUPERVISOR_EXTRA_ARGS, what follows `--`, and what vLLM makes of its own --config.

They go to vLLM as they are, after everything else. They are read here all the same, so that what is wrong with them is
told now instead of ten seconds into vLLM's start, and what they override is not passed twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from json import dumps

from supervisor.settings.config_file import ConfigFile
from supervisor.settings.names import OWNED, REMOVED, ZERO_MEANS_UNSET, advice
from supervisor.settings.options import respell
from supervisor.settings.sources import Report, Setting
from supervisor.settings.typos import missing_hint
from supervisor.vllm.catalogue import Catalogue, Option, key_of
from supervisor.vllm.values import BadValue

NEGATIVE_NUMBER = re.compile(r"-\d+(\.\d+)?")
ByName = dict[str, tuple[Option, Setting]]  # by variable; parts (`--x.y`), and what adds up, by what was written


def read(tokens: Sequence[str], source: str, catalogue: Catalogue, report: Report, *, in_file: bool = False) -> ByName:
    """Returns the options among `tokens`. `in_file`: vLLM makes the tokens of its file."""
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
        if option.key == "config" and (equals_sign or in_file):  # vLLM looks for this very word among its arguments
            report.problems.append(f"{base} ({source}): vLLM reads no file named so: write --config FILE, in two words")
        is_list = option.kind == "list" and not dot
        max_values = 0 if equals_sign or option.is_switch else len(next_tokens) if is_list else 1
        values = [text] if equals_sign else next_tokens[:max_values]
        loose_tokens += next_tokens[max_values:]
        if fault := _find_fault(option, values, dot):
            given = f"{option.variable}={' '.join(values)}" if in_file else " ".join((token, *next_tokens[:max_values]))
            report.problems.append(f"{given} ({source}): {fault}")
            continue
        is_append = option.kind == "append" and not dot
        value: object = not is_off if option.is_switch else tuple(values) if is_list or is_append else "".join(values)
        variable = name if is_append or (dot and not option.is_switch) else option.variable
        options[variable] = option, Setting(variable, value, source)
    report.problems += [f"{token} ({source}): there is no option before it that takes it" for token in loose_tokens]
    return options


def read_vllm_file(file: ConfigFile, catalogue: Catalogue, report: Report) -> ByName:
    """Returns what the file of vLLM's own --config says. Where vLLM takes it for something else, that is a problem."""
    options: ByName = {}
    for name, value in file.typed_content.items():
        key, is_part, is_bool, is_list = key_of(name), "." in name, isinstance(value, bool), isinstance(value, list)
        option, is_off = catalogue.match(f"--{name.partition('.')[0]}")
        if option is None:
            hint = missing_hint(key, catalogue)
            text = f"{file.label}: vLLM {catalogue.version} has no option {name.replace('-', '_')}"
            (report.problems if hint else report.warnings).append(text + (hint or ", and most likely ends at it"))
            continue
        if key == "model" or value == [] or (value is False and (key in OWNED or option.kind == "switch")):
            continue  # the model is read elsewhere; the others vLLM drops, and they say nothing
        both = (dumps(each) if isinstance(each, dict) else each for each in (value, file.content[key]))
        words, written = ([*map(str, each if isinstance(each, list) else [each])] for each in both)
        is_json = is_list and (dict in map(type, value) or (option.kind == "value" and "json" in option.type))
        is_text = is_bool if is_part else not (option.is_switch or "int" in option.type or option.type == "float")
        is_lost = len(_group_tokens(words)) > 1 or (option.kind == "append" and len(words) > 1)
        right_line = f"write {'' if is_off else 'no-'}{option.name[2:]}: true" if option.is_switch else "leave it out"
        faults = {  # what is told -> whether it is so
            f" can't be set there: {OWNED.get(key)}": key in OWNED,
            ": write true, without quotes": option.is_switch and not is_bool,
            ": vLLM can't run with 0: leave it out": words == ["0"] and option.variable in ZERO_MEANS_UNSET,
            ": an empty value is one to vLLM: leave it out": {"", "None"} & {*words} and (is_part or not option.none),
            f": to vLLM a list there is plain words: put what is JSON in quotes, such as '{dumps(value)}'": is_json,
            f": YAML makes {' '.join(words)} of {' '.join(written)}: put it in quotes": is_text and words != written,
            f": vLLM ignores false there: {right_line}": value is False and (is_off or option.default is not False),
            f": vLLM can't take that from a file: set {option.variable}": is_lost,
        }
        report.problems += [f"{file.label}: {key}{fault}" for fault, applies in faults.items() if applies][:1]
        if not any(faults.values()):
            tokens = [f"--no-{option.name[2:]}" if value is False else f"--{name}", *(() if is_bool else words)]
            options |= read(tokens, f"{file.label} {key}", catalogue, report, in_file=True)
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
    if option.is_switch or dot or not values:
        fault = f"{option.name} takes no value" if values else "a value is missing"
        return fault if option.is_switch == bool(values) else None
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
    if reason := advice("no options", base):
        report.problems.append(f"{base} ({source}): {reason}")
    elif base.startswith("--") or not is_short:
        hint = missing_hint(key, catalogue)
        hint = hint if key in REMOVED else hint.replace("_", "-")
        (report.problems if hint else report.warnings).append(message + (hint or "; it is passed as it is"))
