"""Finds the options of `vllm serve` in all sources: which source wins, and what is meant by it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from supervisor.settings import platform
from supervisor.settings.names import MESSAGES, OWNED, QUIET_NAMES, RESPELLED, SM_PREFIX, ZERO_MEANS_UNSET
from supervisor.settings.sources import Entry, Report, Setting, Source, find_all
from supervisor.vllm.catalogue import Catalogue, Option, key_of
from supervisor.vllm.values import json_object, read_bool, unfold

Options = tuple[tuple[Option, Setting], ...]
NGRAM = "[ngram]"  # vLLM's draft by n-grams had this for its model's name; it has a method of its own now


def keys(catalogue: Catalogue) -> list[str]:
    """Returns the keys by which options may be named, in config.yaml, or in capitals as variables."""
    others = [key for row in catalogue.by_key.values() for key in (*map(key_of, row.also), row.opposite) if key]
    return ["model", *catalogue.by_key, *others]


def resolve(
    catalogue: Catalogue, sources: Sequence[Source], environ: Mapping[str, str], report: Report, *, raw_options: Options
) -> tuple[Options, Options]:
    """Returns the options of variables and files that raw ones do not override, and these with what each overrode."""
    chosen_options = []
    # vLLM lets a part of a JSON option (`--x.y 1`) replace the whole of it; only `append` options add up.
    overrode: dict[str, tuple[str, ...]] = {option.variable: () for option, _ in raw_options if option.kind != "append"}
    for option in (option for option in catalogue.by_key.values() if option.key != "model"):
        entries = list(_meanings(option, sources, environ, report))
        if option.key in OWNED:
            labels = [each.source for each in entries if each.source.removeprefix("environment ") not in QUIET_NAMES]
            report.warnings += [f"{source} is not passed to vLLM: {OWNED[option.key]}" for source in labels]
        elif entries and option.variable in overrode:
            overrode[option.variable] = report.describe(entries)
        elif entries:
            setting = report.read(option.variable, entries, option.read, template=option.is_template)
            chosen_options += [(option, setting)] if setting else []
    raw = [(option, replace(setting, overrode=overrode.get(option.variable, ()))) for option, setting in raw_options]
    return tuple(chosen_options), tuple(raw)


def _meanings(option: Option, sources: Sequence[Source], environ: Mapping[str, str], report: Report) -> Iterator[Entry]:
    """Yields what the sources mean by what they say under all of the option's names."""
    opposite = (option.opposite or "").upper()  # DISABLE_PREFIX_CACHING=true
    opposites = find_all(sources, opposite) if opposite else []
    for entry in find_all(sources, option.variable, *(key_of(name).upper() for name in option.also), opposite):
        source, value = entry
        if entry in opposites:
            setting = report.read(opposite, [entry], read_bool)
            if setting is not None:
                yield Entry(f"{source}={report.show(value)}", not setting.value)
            continue
        respelling = respell(option, value)
        if respelling != value:
            report.warnings.append(f"{source}={value} is read as {respelling}, which is how vLLM has it today")
        if option.variable.endswith("LOG_LEVEL") and not unfold(str(respelling).strip(), option.choices):
            known = f"expected one of {', '.join(option.choices)}"  # other programs have levels of their own
            report.warnings.append(f"{source}={report.show(value)} is not passed to vLLM: {known}")
        elif option.variable in ZERO_MEANS_UNSET and str(respelling).strip() == "0":
            report.warnings.append(f"{source}=0 is taken for not set: {MESSAGES['zero']}")
        elif option.variable == "TENSOR_PARALLEL_SIZE" and str(respelling).strip().lower() in platform.AUTO_WORDS:
            yield Entry(f"{source}={respelling}", str(platform.share_gpus(environ, sources)))
        elif not option.is_unset(respelling) and (option.variable, str(respelling).strip()) != ("SPEC_MODEL", NGRAM):
            yield Entry(source, respelling)
    if option.variable == "SPEC_METHOD":
        drafts = find_all(sources, "SPEC_MODEL")
        yield from (Entry(f"{source}={NGRAM}", "ngram") for source, value in drafts if str(value).strip() == NGRAM)
    switch_variable = SM_PREFIX + option.variable
    if environ.get(switch_variable) == "" and option.is_switch:  # as those images read it
        yield Entry(f"environment {switch_variable}", True)


def respell(option: Option, value: object) -> object:
    """Returns how a value is written today, where it is written otherwise and the installed vLLM does not know that."""
    if isinstance(value, bool) or value in option.choices:
        return value
    text = json.dumps(value) if isinstance(value, dict) else str(value).strip()
    if option.variable == "LIMIT_MM_PER_PROMPT":  # `image=10,video=0`, as in worker-vllm until July 2026
        pairs = [re.fullmatch(r"\s*(\w+)\s*[=:]\s*(\d+)\s*", part) for part in text.split(",")]
        return json.dumps({pair[1]: int(pair[2]) for pair in pairs if pair}) if all(pairs) else value
    if option.variable == "COMPILATION_CONFIG":  # `3`, or `{"level": 3}`, which is the `mode` of an object now
        config = {"level": int(text)} if re.fullmatch(r"[0-3]", text) else json_object(text) or {}
        level = {"mode": config.pop("level")} if "level" in config else {}
        return json.dumps(level | config) if level else value  # where both were there, vLLM took `mode`
    return RESPELLED.get(option.variable, {}).get(text.lower(), value)
