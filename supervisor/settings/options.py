"""The options of `vllm serve` from all sources: which source wins, and what is meant by it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from supervisor.settings import platform
from supervisor.settings.config_file import ConfigFile
from supervisor.settings.names import OWNED, OWNED_AND_READ, SAGEMAKER, ZERO_MEANS_UNSET
from supervisor.settings.sources import Found, Report, Setting, Source, find
from supervisor.settings.typos import missing
from supervisor.vllm.catalogue import Catalogue, Option, key_of
from supervisor.vllm.values import json_object, read_bool

Options = tuple[tuple[Option, Setting], ...]
# vLLM's draft by n-grams had this for its model's name; it has a method of its own now.
NGRAM = "[ngram]"
TEXTS, LISTS = ("str", "folded", "csv", "json_or_str"), ("list", "append")  # types and kinds of options
ZERO = "worker-vllm read 0 as 'not set', and vLLM can't run with it"


def keys(catalogue: Catalogue) -> list[str]:
    """By which an option may be named, in config.yaml, or as a variable in capitals."""
    every = catalogue.by_key.values()
    also = [key for option in every for key in (*map(key_of, option.also), option.opposite) if key]
    return ["model", *catalogue.by_key, *also]


def resolve(
    catalogue: Catalogue, sources: Sequence[Source], environ: Mapping[str, str], report: Report, *, raw: Options
) -> tuple[Options, Options]:
    """The options of variables and files, less those that raw arguments override; and these, with what it was."""
    chosen = []
    # vLLM lets a part of a JSON option (`--x.y 1`) replace the whole of it; only `append` options add up.
    overriding: dict[str, tuple[str, ...]] = {option.variable: () for option, _ in raw if option.kind != "append"}
    for option in (option for option in catalogue.by_key.values() if option.key != "model"):
        found = list(_meant(option, sources, environ, report))
        if option.key in OWNED:
            unread = [each.source for each in found if each.source.removeprefix("environment ") not in OWNED_AND_READ]
            report.warnings += [f"{source} is not passed to vLLM: {OWNED[option.key]}" for source in unread]
        elif found and option.variable in overriding:
            overriding[option.variable] = report.overrode(found)
        elif found:
            setting = report.setting(option.variable, found, option.read, template=option.is_template)
            chosen += [(option, setting)] if setting else []
    told = [(option, replace(setting, overrode=overriding.get(option.variable, ()))) for option, setting in raw]
    return tuple(chosen), tuple(told)


def _meant(option: Option, sources: Sequence[Source], environ: Mapping[str, str], report: Report) -> Iterator[Found]:
    """What the sources mean by what they say, under all of the option's names."""
    opposite = (option.opposite or "").upper()  # DISABLE_PREFIX_CACHING=true
    opposed = find(sources, opposite) if opposite else []
    for found in find(sources, option.variable, *(key_of(name).upper() for name in option.also), opposite):
        source, given = found
        if found in opposed:
            setting = report.setting(opposite, [found], read_bool)
            if setting is not None:
                yield Found(f"{source}={report.shown(given)}", not setting.value)
            continue
        meant = respelled(option, given)
        if meant != given:
            report.warnings.append(f"{source}={given} is read as {meant}, which is how vLLM has it today")
        if option.variable in ZERO_MEANS_UNSET and str(meant).strip() == "0":
            report.warnings.append(f"{source}=0 is taken for not set: {ZERO}")
        elif option.variable == "TENSOR_PARALLEL_SIZE" and str(meant).strip().lower() in platform.AUTO:
            yield Found(f"{source}={meant}", str(platform.gpus(environ) or 1))
        elif not option.is_unset(meant) and (option.variable, str(meant).strip()) != ("SPEC_MODEL", NGRAM):
            yield Found(source, meant)
    if option.variable == "SPEC_METHOD":
        drafts = find(sources, "SPEC_MODEL")
        yield from (Found(f"{source}={NGRAM}", "ngram") for source, given in drafts if str(given).strip() == NGRAM)
    flag = SAGEMAKER + option.variable
    if environ.get(flag) == "" and option.is_switch:  # as those images read it
        yield Found(f"environment {flag}", True)


def respelled(option: Option, given: object) -> object:
    """What is to be written today, where it is written otherwise and the installed vLLM does not know that."""
    if isinstance(given, bool) or given in option.choices:
        return given
    text = json.dumps(given) if isinstance(given, dict) else str(given).strip()
    if option.variable == "LIMIT_MM_PER_PROMPT":  # `image=10,video=0`, as in worker-vllm until July 2026
        pairs = [re.fullmatch(r"\s*(\w+)\s*[=:]\s*(\d+)\s*", part) for part in text.split(",")]
        return json.dumps({pair[1]: int(pair[2]) for pair in pairs if pair}) if all(pairs) else given
    if option.variable == "COMPILATION_CONFIG":  # `3`, or `{"level": 3}`, which is the `mode` of an object now
        config = {"level": int(text)} if re.fullmatch(r"[0-3]", text) else json_object(text) or {}
        level = {"mode": config.pop("level")} if "level" in config else {}
        return json.dumps(level | config) if level else given  # of both, vLLM took `mode`
    # Worker-vllm's templates offer it: adapters have the model's own type then.
    return "auto" if (option.variable, text.lower()) == ("LORA_DTYPE", "float32") else given


def of_vllms_file(file: ConfigFile, catalogue: Catalogue, report: Report) -> dict[str, Setting]:
    """What the file of vLLM's own --config says, which vLLM reads itself, by variable. What it may not say, or what
    vLLM would not take, is a problem."""
    found = {}
    for key, given in file.typed.items():
        option, both = catalogue.find(key), (given, file.content.get(key))
        taken, written = ([*map(str, each)] if isinstance(each, list) else [str(each)] for each in both)
        if key in OWNED:
            report.problems.append(f"{file.label}: {key} can't be set there: {OWNED[key]}")
        elif option is None:
            why, told = missing(key, catalogue), f"{file.label}: vLLM {catalogue.version} has no option {key}"
            (report.problems if why else report.warnings).append(told + (why or ", and most likely ends at it"))
        elif isinstance(given, list) and (option.kind not in LISTS or any(isinstance(each, dict) for each in given)):
            why = f"to vLLM a list there is plain words: put what is JSON in quotes, such as '{json.dumps(given)}'"
            report.problems.append(f"{file.label}: {key}: {why}")
        elif key != "model" and option.type in TEXTS and not option.is_switch and taken != written:
            why = f"YAML makes {' '.join(taken)} of {' '.join(written)}: put it in quotes"
            report.problems.append(f"{file.label}: {key}: {why}")
        elif key != "model" and not option.is_unset(given):
            found[option.variable] = report.setting(option.variable, [Found(f"{file.label} {key}", given)], option.read)
    return {variable: setting for variable, setting in found.items() if setting is not None}
